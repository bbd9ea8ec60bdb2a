"""Where tensors lie in their files → the tensors, each byte of them held against its checksum where there is one."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from train_clip.checkpoints.archive import TensorRecord
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
