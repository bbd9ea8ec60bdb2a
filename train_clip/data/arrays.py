"""An image as an array in a zip (``.npz``): written whole, read without trusting a byte of it.

The array is called ``data`` and is (3, H, W): uint8, a picture; or float16 or float32, already normalized pixels.
Nothing is unpickled, and what a header claims is held against the file before any memory is taken for it.
"""

import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from train_clip.data.images import MAX_PIXELS, reading, require_sides
from train_clip.errors import BadSample
from train_clip.files import opened, replacing

MEMBER = "data.npy"  # how numpy.savez names the array "data"
MAX_HEADER = 10_000  # bytes of an array's header: numpy's own limit for text that it parses
MAX_DATA = 3 * MAX_PIXELS  # bytes: the largest picture that is read from any file

# A zip's end (APPNOTE.TXT, 4.3.15 and 4.3.16). Its directory is read whole into objects, some kilobytes for 46 bytes.
END, END_LENGTH, LOCATOR, LOCATOR_LENGTH = b"PK\5\6", 22, b"PK\6\7", 20
MAX_DIRECTORY = 2**16  # bytes; that of one array takes about 60


def read_array(path: str) -> np.ndarray:
    """Read an image's array, (3, H, W) uint8, float16 or float32, read-only and finite.

    Raises:
        BadSample: no zip or a damaged one, no ``data`` in it, objects, another dtype or shape, a size that the file
            does not hold, or that no picture may have.
    """
    with reading(path, "npz"), opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        _require_small_directory(path, file, size)
        with zipfile.ZipFile(file) as archive:
            entry = archive.NameToInfo.get(MEMBER)
            if entry is None:
                raise BadSample(path, "npz without the array 'data'")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadSample(path, "npz compressed with another method than deflate")
            if entry.compress_size > size:
                raise BadSample(path, "npz that claims to be larger than its file")
            if entry.file_size > MAX_DATA + MAX_HEADER + npy.MAGIC_LEN:
                raise BadSample(path, f"npz array over {MAX_DATA:,} bytes")
            with archive.open(entry) as member:
                shape, fortran_order, dtype = _header(path, member, entry.file_size)
                # With the last byte comes the check of its sum.
                values = np.frombuffer(member.read(math.prod(shape) * dtype.itemsize), dtype)
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise BadSample(path, "npz with values that are not finite")
    return values.reshape(shape, order="F" if fortran_order else "C")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an image's (3, H, W) array, whole or not at all: the same bytes for the same array; its folder is made."""
    with replacing(path) as beside, beside.open("wb") as file:
        # Stored: deflate takes a fifth off photographs, and more time to read than all else together (docs/data.md).
        np.savez(file, data=np.ascontiguousarray(array))


def _require_small_directory(path: str, file: IO[bytes], size: int) -> None:
    if not size:
        raise BadSample(path, "empty file")
    # As zipfile finds it: at the very end, or before a comment of up to 64 KiB.
    file.seek(-min(size, END_LENGTH + LOCATOR_LENGTH + 2**16), os.SEEK_END)
    tail = file.read()
    at = len(tail) - END_LENGTH if tail[-END_LENGTH:].startswith(END) and tail.endswith(b"\0\0") else tail.rfind(END)
    if at < 0:
        raise BadSample(path, "not an npz file, or a truncated one")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    if directory > MAX_DIRECTORY or tail[max(at - LOCATOR_LENGTH, 0) : at].startswith(LOCATOR):
        raise BadSample(path, "npz with more arrays than an image needs")
    file.seek(0)


def _header(path: str, member: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(member))
    if read is None:
        raise BadSample(path, "npz array with an unknown format")
    shape, fortran_order, dtype = read(member, max_header_size=MAX_HEADER)
    if dtype not in (np.uint8, np.float16, np.float32):
        raise BadSample(path, f"npz of dtype {dtype.str}; expected uint8, float16 or float32")
    if len(shape) != 3 or shape[0] != 3:
        raise BadSample(path, "npz with another shape than (3, height, width)")
    require_sides(path, *shape[1:])
    if math.prod(shape) * dtype.itemsize != size - member.tell():
        raise BadSample(path, "npz whose array does not have the size in its header")
    return shape, fortran_order, dtype
