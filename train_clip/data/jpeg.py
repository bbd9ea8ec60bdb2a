"""A training crop of an image file: a plain JPEG is decoded no finer than the crop needs, all else as images.py does.

libjpeg-turbo by simplejpeg gives the pixels that it gives by Pillow, at each scale, in three quarters of the time. What
it does not take without a word is left to Pillow, which has the last one on what is damaged.

H, W  of the pixels
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train_clip.data.images import decoded, opened, turn_of
from train_clip.data.windows import Draw, Window, cut, reduced

FORMATS = ("JPEG", "MPO")  # an MPO is a JPEG with others behind it
MODES = ("RGB", "L")  # of which RGB is made by no choice of ours

SIDES_SWAPPED = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def crop_of_image(path: str, draw: Draw) -> Tensor:
    """Draw a window in an image's size and cut it.

    Args:
        path: as ``read_image`` takes it.
        draw: is asked once.

    Returns:
        (3, S, S) uint8.

    Raises:
        BadSample: as ``read_image``.
    """
    return cut(*_read(path, draw))


def _read(path: str, draw: Draw) -> tuple[NDArray[Any], Window, int]:
    """Pixels, the window in the picture, and by how much the pixels are fewer along each side."""
    with opened(path) as (picture, file):
        if picture.format not in FORMATS or picture.mode not in MODES:
            whole = decoded(picture, path).picture
            return _planes(whole), draw(whole.size), 1
        turn = turn_of(picture, [])
        width, height = picture.size
        window = draw((height, width) if turn in SIDES_SWAPPED else (width, height))
        pixels = _reduced(picture, file, window.reduction)
        if pixels is None:
            return _planes(decoded(picture, path).picture), window, 1
        if turn is not None:
            return _planes(Image.fromarray(pixels).transpose(turn)), window, window.reduction
        return pixels.transpose(2, 0, 1), window, window.reduction


def _reduced(picture: Image.Image, file: BinaryIO, reduction: int) -> NDArray[Any] | None:
    """Decode to (H, W, 3), fewer by the reduction; None where Pillow is to say what is wrong, or that nothing is."""
    width, height = picture.size
    expected = (-(-height // reduction), -(-width // reduction), 3)
    file.seek(0)
    try:
        # Strict, as it is unless told otherwise: libjpeg's warnings raise, of bytes missing among others.
        pixels = simplejpeg.decode_jpeg(file.read(), min_height=expected[0], min_width=expected[1])
    except Exception:
        return None
    if pixels.shape != expected:
        return None
    # The last row and column count where at least half of what they stand for lies within the picture.
    return pixels[: reduced(height, reduction), : reduced(width, reduction)]


def _planes(picture: Image.Image) -> NDArray[Any]:
    return np.array(picture).transpose(2, 0, 1)
