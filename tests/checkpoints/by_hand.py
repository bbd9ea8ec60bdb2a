"""Archives as PyTorch writes them, but by hand: a pickle byte by byte, and any entries around it."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY
from train_clip.checkpoints.found import identify
from train_clip.checkpoints.read import read_tensors
from train_clip.checkpoints.sources import read_contents
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

START, STOP = b"\x80\x02", b"."
NONE, DICT, LIST, MARK, EMPTY = b"N", b"}", b"]", b"(", b")"
REDUCE, NEWOBJ, BUILD, PERSISTENT = b"R", b"\x81", b"b", b"Q"
SETITEM, SETITEMS, APPENDS, TUPLE, TUPLE1, TUPLE2, TUPLE3 = b"s", b"u", b"e", b"t", b"\x85", b"\x86", b"\x87"


def named(name: str) -> bytes:
    """What a pickle says for a function or a class."""
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def many(*parts: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(parts) + TUPLE


def store(place: int) -> bytes:
    return b"r" + struct.pack("<I", place)


def recall(place: int) -> bytes:
    return b"j" + struct.pack("<I", place)


def storage(key: bytes = text("0"), kind: str = "torch.FloatStorage", numel: bytes = number(4)) -> bytes:
    return many(text("storage"), named(kind), key, text("cpu"), numel) + PERSISTENT


def tensor(
    held: bytes | None = None,
    offset: bytes = number(0),
    shape: bytes = many(number(4)),
    stride: bytes = many(number(1)),
    metadata: bytes = b"",
) -> bytes:
    """A tensor of four float32 at the beginning of storage 0, but for what is given."""
    rest = b"\x89" + named("collections.OrderedDict") + EMPTY + REDUCE + metadata
    return (
        named("torch._utils._rebuild_tensor_v2")
        + many(storage() if held is None else held, offset, shape, stride, rest)
        + REDUCE
    )


def state(**entries: bytes) -> bytes:
    """A whole program: a dict, whose values are given as programs."""
    return START + DICT + b"".join(text(name) + value + SETITEM for name, value in entries.items()) + STOP


def write(
    path: Path, program: bytes, entries: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """An archive of a program and one storage of four numbers, or what is given in its place."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program, compression)
        archive.writestr("a/version", "3\n")
        for name, content in ({"a/data/0": struct.pack("<4f", 1, 2, 3, 4)} if entries is None else entries).items():
            archive.writestr(name, content)
    return path


def read_all(path: Path) -> dict[str, Tensor]:
    """Look into a file and read what is there."""
    return read_tensors(read_contents(path).tensors)


def refusal(path: Path, read: Callable[[Path], Any] = read_all) -> str:
    """The message of the refusal, which names the file; anything else than a ``UserError`` raises or fails."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def look(path: Path) -> Any:
    """Say which model lies in a file."""
    return identify(read_contents(path))


def tiny_clip(**changes: Any) -> CLIP:
    """A CLIP whose tensors are all random, gains and biases too."""
    torch.manual_seed(0)
    model = CLIP(config_from_dict(TINY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
