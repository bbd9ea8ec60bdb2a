"""Checkpoints that are whole or absent when written, and whole or refused when read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from train_clip.errors import UserError
from train_clip.files import replacing

MARKED_AS_FOLDER = 0x10  # the MS-DOS attribute, in a zip archive's directory


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside the target, synced and renamed; checked before they are loaded."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a local path.

        Args:
            checkpoint: plain data and tensors.
            path: the file's final place.
            storage_options: not used.

        Raises:
            UserError: the path is an address, or cannot be written; a file that was there is as it was.
        """
        if "://" in str(path):
            raise UserError(f"{path}: checkpoints are written to local files only. Give a local --output and copy it.")
        try:
            # Through a file of Python's own: its errors say what is wrong, such as a full disk.
            with replacing(Path(path)) as beside:
                with beside.open("wb") as file:
                    torch.save(checkpoint, file)
                # What cannot be read again is found out now, and not when it is needed.
                torch.load(beside, weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: not written, since it would hold more than plain data, and could not be loaded "
                f"without running code ({_reason(error)}). Expected tensors, numbers, text, lists and dicts in the "
                "state_dict of every callback, module and data module."
            ) from error
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot be written ({_reason(error)}). Earlier checkpoints are as they were. Free space or "
                "the permission to write there, and resume from the newest."
            ) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of plain data, every byte of it checked.

        Args:
            path: a local file.
            map_location: as for ``torch.load``.
            weights_only: not used: code in a file is never run.

        Raises:
            UserError: there is no such file, or it is damaged or holds more than plain data.
        """
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint: plain data only, each record held against the checksum that it was written with.

    Raises:
        UserError: as ``AtomicCheckpointIO.load_checkpoint``.
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
            f"{path}: no checkpoint, or not all of one ({_reason(error)}). Use another checkpoint."
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


def _reason(error: BaseException) -> str:
    """The first line of the error that lies deepest, which for a full disk is the system's."""
    while error.__context__ is not None:
        error = error.__context__
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0][:200]
