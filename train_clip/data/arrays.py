"""An image as an array in a zip (``.npz``): written whole, read without trusting a byte of it.

The array is called ``data`` and is (3, H, W): uint8, a picture; or float16 or float32, pixels that are already
normalised. Nothing is unpickled, and what a header claims is held against the file before any memory is taken for it.

H, W  pixels
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from train_clip.data.images import MAX_ASPECT, MAX_BYTES, MAX_PIXELS, MIN_SIDE, reading
from train_clip.errors import BadSample
from train_clip.files import replacing

MEMBER = "data.npy"  # how numpy.savez names the array "data"
DTYPES = (np.dtype(np.uint8), np.dtype(np.float16), np.dtype(np.float32))
MAX_HEADER = 10_000  # bytes of an array's header: numpy's own limit for text that it parses
MAX_DATA = 3 * MAX_PIXELS  # bytes: the largest picture that is read from any file
MAX_DEFLATED = 1032  # bytes out of one: deflate's best (zlib's technical details)

# A zip's end (APPNOTE.TXT, 4.3.15 and 4.3.16). Its directory is read whole into objects, some kilobytes for 46 bytes.
END, END_LENGTH, LOCATOR, LOCATOR_LENGTH = b"PK\5\6", 22, b"PK\6\7", 20
MAX_DIRECTORY = 2**16  # bytes; that of one array takes about 60


class Header(NamedTuple):
    """What an array is said to be.

    Args:
        shape: (3, H, W).
        dtype: uint8, float16 or float32.
        fortran_order: whether the first axis is the one that runs fastest.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    fortran_order: bool


def read_header(path: str) -> Header:
    """Read what a file says that it holds, without reading it.

    Raises:
        BadSample: as ``read_array``, but for damage behind the header.
    """
    with reading(path, "npz"), _open(path) as (member, size):
        return _header(path, member, size)


def read_array(path: str) -> NDArray[Any]:
    """Read an image's array.

    Args:
        path: an ``.npz`` file with the array ``data``, stored or deflated.

    Returns:
        (3, H, W) uint8, float16 or float32, read-only; floating-point values are finite.

    Raises:
        BadSample: no zip or a damaged one, no ``data`` in it, objects, another dtype or shape, a size that the file
            does not hold, or that no picture may have.
    """
    with reading(path, "npz"), _open(path) as (member, size):
        shape, dtype, fortran_order = _header(path, member, size)
        # With the last byte comes the check of its sum.
        content = member.read(_num_bytes(shape, dtype))
    values = np.frombuffer(content, dtype)
    array = values.reshape(shape[::-1]).T if fortran_order else values.reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSample(path, "npz of values that are not finite")
    return array


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an image's array, whole or not at all: the same bytes for the same array.

    Args:
        path: to be written; its folder is made.
        array: (3, H, W).
    """
    content = io.BytesIO()
    # Stored: deflate takes a fifth off photographs, and more time to read than all else together (docs/data.md).
    np.savez(content, data=np.ascontiguousarray(array))
    with replacing(path) as beside:
        beside.write_bytes(content.getbuffer())


@contextmanager
def _open(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """The array's entry, to be read, and its size in bytes."""
    with Path(path).open("rb") as file, _archive(path, file) as archive:
        entry = _entry(path, archive)
        with archive.open(entry) as member:
            yield member, entry.file_size


def _archive(path: str, file: BinaryIO) -> zipfile.ZipFile:
    """Open the zip, once its directory is known to be small."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise BadSample(path, "empty file")
    if size > MAX_BYTES:
        raise BadSample(path, f"npz file over {MAX_BYTES:,} bytes")
    # As zipfile finds it: at the very end, or before a comment of up to 64 KiB.
    file.seek(-min(size, END_LENGTH + LOCATOR_LENGTH + 2**16), os.SEEK_END)
    tail = file.read()
    at = len(tail) - END_LENGTH if tail[-END_LENGTH:].startswith(END) and tail.endswith(b"\0\0") else tail.rfind(END)
    if at < 0:
        raise BadSample(path, "not an npz file, or one that is cut short")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    if directory > MAX_DIRECTORY or tail[max(at - LOCATOR_LENGTH, 0) : at].startswith(LOCATOR):
        raise BadSample(path, "npz of more arrays than an image has")
    file.seek(0)
    return zipfile.ZipFile(file)


def _entry(path: str, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The array's entry, once the sizes that it claims are known to be possible."""
    if MEMBER not in archive.NameToInfo:
        raise BadSample(path, "npz without the array 'data'")
    entry = archive.getinfo(MEMBER)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadSample(path, "npz compressed by another method than deflate")
    most = entry.compress_size * (MAX_DEFLATED if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
    whole = archive.fp is not None and entry.compress_size <= os.fstat(archive.fp.fileno()).st_size
    if entry.file_size > most or not whole:
        raise BadSample(path, "npz that says to be larger than its file")
    if entry.file_size > MAX_DATA + MAX_HEADER + npy.MAGIC_LEN:
        raise BadSample(path, f"npz array over {MAX_DATA:,} bytes")
    return entry


def _header(path: str, member: IO[bytes], size: int) -> Header:
    """Read the array's own header, and hold it against the size of the entry."""
    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise BadSample(path, "npz array of an unknown format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(member, max_header_size=MAX_HEADER)
    if dtype.hasobject:
        raise BadSample(path, "npz of objects, which are not read")
    if dtype not in DTYPES:
        raise BadSample(path, f"npz of dtype {dtype.str}; expected uint8, float16 or float32")
    if len(shape) != 3 or shape[0] != 3:
        raise BadSample(path, "npz of another shape than (3, height, width)")
    _, height, width = shape
    least, most = min(height, width), max(height, width)
    if least < MIN_SIDE or most > MAX_ASPECT * least:
        raise BadSample(path, f"a side under {MIN_SIDE} pixels or an aspect over {MAX_ASPECT}")
    if _num_bytes(shape, dtype) != size - member.tell():
        raise BadSample(path, "npz whose array is not of the size that its header says")
    return Header((3, height, width), dtype, fortran_order)


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return shape[0] * shape[1] * shape[2] * dtype.itemsize
