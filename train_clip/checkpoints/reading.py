"""Checkpoints are whole and hold plain data when they are read, or they are refused: no code in a file is ever run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from train_clip.errors import UserError

MARKED_AS_FOLDER = 0x10  # the MS-DOS attribute, in a zip archive's directory


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint: plain data only, each record held against the checksum that it was written with.

    Raises:
        UserError: there is no such file, or it is damaged or holds more than plain data.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {what}; expected a checkpoint, such as RUN/checkpoints/last.ckpt.")
    try:
        require_whole(path)
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than plain data; nothing of it was run. Expected a checkpoint of `train-clip train`."
        ) from error
    except Exception as error:
        # A foreign, empty or truncated file raises anything from BadZipFile to KeyError.
        raise UserError(
            f"{path}: no checkpoint, or not all of one ({root_cause(error)}). Use another checkpoint."
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; expected a checkpoint of `train-clip train`.")
    return loaded


def require_whole(path: Path) -> None:
    """Hold every record of a checkpoint against its checksum.

    Raises:
        UserError: a record is not what was written.
        zipfile.BadZipFile: it is no such file at all, or cut short.
    """
    with zipfile.ZipFile(path) as archive:
        # PyTorch takes an entry that is marked as a folder for an empty one, and its checksum is not looked at.
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & MARKED_AS_FOLDER]
        damaged = archive.testzip() or next(iter(folders), None)
    if damaged is not None:
        raise UserError(f"{path}: damaged (its record {damaged} is not what was written). Use another checkpoint.")


def root_cause(error: BaseException) -> str:
    """The first line of the error that lies deepest, which for a full disk is the system's."""
    while error.__context__ is not None:
        error = error.__context__
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0][:200]
