"""The file of an image, or of its array → the square that a model takes.

An array of bytes is the picture that the image gives once its shorter side is the model's, so that crops of whole
height are those of the image: in evaluation bit for bit, in training the same window, of an image that was decoded no
finer than that needs and resized by another hand than Pillow's (windows.py).

S  side of the square in pixels      H, W  of an array
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train_clip.data.images import Decoded, open_rgb, read_image
from train_clip.data.jpeg import crop_of_image
from train_clip.data.npz import is_npz, read_array, read_header
from train_clip.data.transforms import to_tensor
from train_clip.data.windows import Draw, cut
from train_clip.errors import BadSample, UserError

NORMALISED = "already normalised pixels, taken as they are, without a crop"

Crop = Callable[[Image.Image], Image.Image]


def read_square(path: str, size: int, crop: Crop) -> Tensor:
    """Read what a model takes of an image.

    Args:
        path: an image, or an ``.npz`` file as ``read_array`` takes it.
        size: S.
        crop: makes an S×S of a picture. Pixels that are already normalised have been cropped.

    Returns:
        (3, S, S): uint8, or float32 that is already normalised.

    Raises:
        BadSample: the file cannot be used.
        UserError: an array that was made for another S. It is no bad sample that another could stand in for: all of a
            cache are made for one size, and resized once more they would not be what the images give.
    """
    if not is_npz(path):
        return to_tensor(crop(open_rgb(path)))
    array = _array(path, size)
    return to_tensor(crop(_picture(array))) if array.dtype == np.uint8 else torch.from_numpy(array.astype(np.float32))


def read_window(path: str, size: int, draw: Draw) -> Tensor:
    """Read a training crop of an image.

    Args:
        path: as ``read_square``.
        size: S.
        draw: a window in the picture. Pixels that are already normalised have been cropped.

    Returns:
        (3, S, S): uint8, or float32 that is already normalised.

    Raises:
        BadSample: the file cannot be used.
        UserError: as ``read_square``.
    """
    if not is_npz(path):
        return crop_of_image(path, draw)
    array = _array(path, size)
    _, height, width = array.shape
    return cut(array, draw((width, height))) if array.dtype == np.uint8 else torch.from_numpy(array.astype(np.float32))


@dataclass(frozen=True)
class PixelKind:
    """What the files of one list hold; a batch must be of one kind.

    Args:
        dtype: uint8, or float32 for pixels that are already normalised.
        example: the file that it was taken from.
    """

    dtype: torch.dtype
    example: str

    def require(self, pixels: Tensor, path: str) -> Tensor:
        """Return the pixels.

        Raises:
            UserError: they are of the other kind.
        """
        if pixels.dtype == self.dtype:
            return pixels
        found = {self.dtype: self.example, pixels.dtype: path}
        raise UserError(
            f"{found[torch.uint8]}: holds a picture, while {found[torch.float32]} holds {NORMALISED}. Expected one "
            "kind, as a batch is of one. Move the other files away; `train-clip data npz` makes arrays of pictures."
        )


def kind_of(paths: Iterable[str], size: int) -> PixelKind:
    """What the first file that can be read holds; a picture where none can.

    Args:
        paths: of one list.
        size: S.

    Raises:
        UserError: an array that was made for another S, as ``read_square``.
    """
    for path in paths:
        if not is_npz(path):
            return PixelKind(torch.uint8, path)
        try:
            shape, dtype, _ = read_header(path)
        except BadSample:
            continue
        _require_size(path, shape, dtype, size)
        return PixelKind(torch.uint8 if dtype == np.uint8 else torch.float32, path)
    return PixelKind(torch.uint8, "")


def read_picture(path: str) -> Decoded:
    """Read an image, or its array, as a picture to look at.

    Raises:
        BadSample: the file cannot be used.
    """
    if not is_npz(path):
        return read_image(path)
    array = read_array(path)
    if array.dtype == np.uint8:
        return Decoded(_picture(array), ())
    return Decoded(_picture(_stretched(array)), (NORMALISED,))


def bytes_to_show(pixels: Tensor) -> Tensor:
    """Map what ``read_square`` gives to (3, S, S) uint8 to look at."""
    return pixels if pixels.dtype == torch.uint8 else torch.from_numpy(_stretched(pixels.numpy()))


def _array(path: str, size: int) -> NDArray[Any]:
    array = read_array(path)
    _require_size(path, array.shape, array.dtype, size)
    return array


def _picture(array: NDArray[Any]) -> Image.Image:
    # Plane by plane: a sixth of the time of turning the array's axes round.
    return Image.merge("RGB", [Image.fromarray(plane) for plane in array])


def _stretched(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Bytes from the least value to the greatest: by which mean and deviation pixels are normalised no file says."""
    values = array.astype(np.float32)
    least, most = values.min(), values.max()
    return ((values - least) * (255 / max(most - least, np.float32(1e-6)))).astype(np.uint8)


def _require_size(path: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
    _, height, width = shape
    if dtype == np.uint8 and min(height, width) != size:
        raise UserError(
            f"{path}: was made for a model of {min(height, width)} pixels (it is {width} by {height}); expected "
            f"{size} on its shorter side. Make the cache anew: train-clip data npz FOLDER --image_size {size}"
        )
    if dtype != np.uint8 and (height, width) != (size, size):
        raise UserError(
            f"{path}: holds {NORMALISED}, {width} by {height} of them; expected {size} by {size}. Train a model of "
            "that size (--image_size), or move the file away and make a cache of the images: train-clip data npz"
        )
