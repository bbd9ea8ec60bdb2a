"""Checkpoints are whole and hold plain data when they are read, or they are refused: no code in a file is ever run.

Where tensors lie in their files → the tensors, each byte of them held against its checksum where there is one.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train_clip.checkpoints.read import TensorRecord
from train_clip.errors import UserError, first_line

MOST_SHARED = 4  # times that all numbers may be used on the average; tied weights make it less than 2


def read_tensors(records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
    """Read tensors into memory; floating point of any width becomes float32.

    Args:
        records: as ``read_contents`` found them.

    Raises:
        UserError: a file that has changed since, or is damaged.
    """
    _require_sense(records)
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(record.file for record in records.values()):
        own = {name: record for name, record in records.items() if record.file == file}
        read = _from_safetensors if next(iter(own.values())).stride is None else _from_archive
        try:
            tensors |= read(file, own)
        except Exception as error:
            # Damaged archives raise whatever their parsers do, from BadZipFile and EOFError to UnicodeDecodeError.
            raise UserError(
                f"{file}: damaged ({first_line(error)}). Get the file again, or use another checkpoint."
            ) from error
    return {name: tensors[name] for name in records}


def _require_sense(records: Mapping[str, TensorRecord]) -> None:
    """Refuse tensors that share their storages so often that they would take many times the file's size."""
    reaches: dict[tuple[Path, str], int] = {}
    for record in records.values():
        place = (record.file, record.entry)
        reaches[place] = max(reaches.get(place, 0), _reach(record))
    total = sum(math.prod(record.shape) for record in records.values())
    if total > MOST_SHARED * sum(reaches.values()):
        file = next(iter(records.values())).file
        raise UserError(f"{file}: the same numbers stand for many tensors. Expected tensors of their own.")


def _reach(record: TensorRecord) -> int:
    """The place behind a tensor's last element in its storage."""
    if record.stride is None or not math.prod(record.shape):
        return math.prod(record.shape)
    return record.offset + 1 + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))


def _from_archive(file: Path, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
    """Tensors of a zip archive, whose reader checks each entry against its checksum."""
    by_storage: dict[str, dict[str, TensorRecord]] = {}
    for name, record in records.items():
        by_storage.setdefault(record.entry, {})[name] = record
    found = {}
    with zipfile.ZipFile(file) as archive:
        for entry, sharing in by_storage.items():
            # A bytearray, since PyTorch wants memory that it may write to.
            content = bytearray(archive.read(entry))
            dtype = getattr(torch, next(iter(sharing.values())).dtype)
            storage = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            for name, record in sharing.items():
                tensor = storage.as_strided(record.shape, record.stride or (), record.offset)
                # What shared its storage in the file is no longer one when it is trained.
                found[name] = _wide(tensor if len(sharing) == 1 else tensor.clone())
    return found


def _from_safetensors(file: Path, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as tensors:
        return {name: _wide(tensors.get_tensor(record.entry)) for name, record in records.items()}


def _wide(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


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
