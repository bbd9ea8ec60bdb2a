"""The file of an image, or of its array → the model's square input: the center for evaluation, a crop in training.

Evaluation prepares pictures by Pillow, bit for bit as OpenAI does. Training draws a window from a picture's size alone
and cuts it by PyTorch's bicubic with antialiasing, in a third of Pillow's time: equal to within 3 of 255 where neither
has to clip between its passes. A plain JPEG is decoded no finer than its window needs. Pixels stay uint8: they are
normalized on the device.

S  side of the square in pixels      H, W  of the pixels
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image

from train_clip.data import arrays, images
from train_clip.errors import UserError, WrongType

REDUCTIONS = (8, 4, 2)  # at which libjpeg's inverse transform is smaller by as much and as exact (jdct.h)
NORMALISED = "already normalized pixels, used unchanged, without a crop"


class Square(int):
    """S, and how a picture becomes the square: as set here CLIP's way, for which a plain number stands too."""

    whole = 0  # what the shorter side is resized to, or both are, before the S×S in the middle is left; 0: S
    squashed = False  # whether both sides are
    resampling = "bicubic"  # or bilinear

    @classmethod
    def of(cls, size: int) -> "Square":
        """The same size, as a square."""
        return size if isinstance(size, cls) else cls(size)


def read_square(path: str, size: int, draw: Callable[[tuple[int, int]], "Window"] | None = None) -> torch.Tensor:
    """Read what a model takes of an image or its array: (3, S, S) uint8, or float32 that is already normalized.

    An array of bytes is the picture that the image gives once its shorter side is S, so that crops of whole height are
    those of the image. Pixels that are already normalized have been cropped. ``draw`` gives training's window in a
    picture of a width and a height; without it the crop is evaluation's, of the center.

    Raises:
        BadSample: the file cannot be used.
        UserError: an array that was made for another S. It is not a bad sample to be replaced: a whole cache is written
            for one size, and resizing again would give other pixels than the images. Likewise an array of bytes for a
            model whose square is made in another way than CLIP's.
    """
    if images.is_npz(path):
        array = arrays.read_array(path)
        _require_plain(path, array, size)
        _require_size(path, array, size)
        if array.dtype != np.uint8:
            return torch.from_numpy(array.astype(np.float32))
        return cut(array, draw((array.shape[2], array.shape[1]))) if draw else centre_square(as_picture(array), size)
    if draw is None:
        return centre_square(path, size)
    image = images.open_image(path)
    if isinstance(image, Image.Image):
        return cut(_planes(image), draw(image.size))
    window = draw(image.size[::-1] if image.turn in images.SIDES_SWAPPED else image.size)
    pixels = _reduced(image, window.reduction)
    if pixels is None:
        return cut(_planes(images.open_rgb(path)), window)
    return cut(pixels.transpose(2, 0, 1), window, window.reduction)


class Window(NamedTuple):
    """A box of a picture, what it is resized to, and the square that is cut out of that."""

    box: tuple[int, int, int, int]  # left, top, right and bottom in pixels of the upright picture
    target: tuple[int, int]  # width and height that the box is resized to
    place: tuple[int, int]  # left and top of the square within them
    size: int  # S

    @property
    def reduction(self) -> int:
        """By how much the picture may be smaller than it is, for the box to be no smaller than its target."""
        left, top, right, bottom = self.box
        room = min((right - left) / self.target[0], (bottom - top) / self.target[1])
        return next((reduction for reduction in REDUCTIONS if reduction <= room), 1)


def random_crop(picture: tuple[int, int], size: int, rng: np.random.Generator) -> Window:
    """Shorter side of a width and height to S, then an S×S at random: the paper's only augmentation (section 2.4)."""
    target = shorter_to(picture, size)
    left, top = (int(rng.integers(side - size + 1)) for side in target)
    return Window((0, 0, *picture), target, (left, top), size)


def random_resized_crop(picture: tuple[int, int], size: int, rng: np.random.Generator, min_share: float) -> Window:
    """A square of at least a fraction of the largest one's area, resized to S×S: train-CLIP's crop.

    On square pictures this is torchvision's ``RandomResizedCrop(scale=(min_share, 1), ratio=(1, 1))``; on others that
    takes shares of the whole picture's area. Of a picture that is squashed it is a part of the same form.
    """
    largest = picture if Square.of(size).squashed else (min(picture),) * 2
    share = math.sqrt(rng.uniform(min_share, 1.0))
    wide, high = (max(1, round(side * share)) for side in largest)
    left, top = (int(rng.integers(whole - side + 1)) for whole, side in zip(picture, (wide, high), strict=True))
    return Window((left, top, left + wide, top + high), (size, size), (0, 0), size)


def cut(pixels: np.ndarray, window: Window, reduction: int = 1) -> torch.Tensor:
    """Resize the window's box and cut its square, (3, S, S), out of (3, H, W) uint8, in any order in memory.

    The pixels are fewer along each side, by the reduction, than in the picture that the window is of.
    """
    left, top, right, bottom = (reduced(edge, reduction) for edge in window.box)
    box = torch.from_numpy(np.require(pixels[:, top:bottom, left:right], requirements="W"))
    wide, high = window.target
    if box.shape[1:] != (high, wide):
        mode = Square.of(window.size).resampling
        (box,) = torch.nn.functional.interpolate(box[None], (high, wide), mode=mode, antialias=True)
    left, top = window.place
    return box[:, top : top + window.size, left : left + window.size].contiguous()


def reduced(edge: int, reduction: int) -> int:
    """Which of the fewer pixels is nearest; half-way the later one, so that no box is smaller than it may be."""
    return (edge + reduction // 2) // reduction


def _reduced(jpeg: images.Jpeg, reduction: int) -> np.ndarray | None:
    """Decode to (H, W, 3), upright, fewer by the reduction; None where Pillow is to say what is wrong, if anything."""
    width, height = jpeg.size
    expected = (-(-height // reduction), -(-width // reduction), 3)
    try:
        # Strict, as it is unless told otherwise: libjpeg's warnings raise, of bytes missing among others.
        pixels = simplejpeg.decode_jpeg(jpeg.content, min_height=expected[0], min_width=expected[1])
    except Exception:
        return None
    if pixels.shape != expected:
        return None
    # The last row and column count where at least half of what they stand for lies within the picture.
    pixels = pixels[: reduced(height, reduction), : reduced(width, reduction)]
    return pixels if jpeg.turn is None else np.array(Image.fromarray(pixels).transpose(jpeg.turn))


def centre_square(image: Image.Image | str | Path, size: int) -> torch.Tensor:
    """Prepare a picture, or the file of one, as evaluation takes it: its center crop, (3, S, S) uint8."""
    if isinstance(image, Image.Image):
        return to_tensor(center_crop(images.upright_rgb(image, "picture", []), size))
    if isinstance(image, str | os.PathLike):
        return to_tensor(center_crop(images.open_rgb(str(image)), size))
    raise WrongType(
        f"Found a {type(image).__name__} for an image; expected a picture (PIL.Image.Image) or the path of one. Give "
        "several one by one, and an array as PIL.Image.fromarray(array)."
    )


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side of an RGB picture to S, then the S×S in the middle (openai/CLIP, clip.py, _transform)."""
    picture = resize_shorter(picture, size)
    # torchvision's CenterCrop rounds halves to even, as round() does; transformers' rounds them down.
    left, top = ((side - size) // 2 if isinstance(size, Square) else round((side - size) / 2) for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def resize_shorter(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side of an RGB picture to S; one of that size keeps its pixels."""
    return picture.resize(shorter_to(picture.size, size), Image.Resampling[Square.of(size).resampling.upper()])


def shorter_to(picture: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height once the shorter becomes S; the longer is cut to whole pixels, as torchvision's Resize does."""
    square = Square.of(size)
    shorter, picture = square.whole or size, (1, 1) if square.squashed else picture
    width, height = (int(shorter * side / min(picture)) for side in picture)
    return width, height


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Map an RGB picture to (3, H, W) uint8."""
    return torch.from_numpy(_planes(picture)).contiguous()


def _planes(picture: Image.Image) -> np.ndarray:
    return np.array(picture).transpose(2, 0, 1)


class Preprocess:
    """Shorter side to S by bicubic interpolation, the S×S in the middle, (x / 255 - mean) / std.

    Bit for bit as OpenAI's (openai/CLIP, clip.py, _transform), but that pictures are turned upright by their EXIF, and
    are made RGB, transparency composited on white, before they are resized. Mean and std: (3, 1, 1) float32, in [0, 1].
    """

    def __init__(self, size: int, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.size, self.mean, self.std = size, mean.cpu(), std.cpu()

    def __call__(self, image: Image.Image | str | Path) -> torch.Tensor:
        """Prepare a picture, or the file of one (``BadSample`` where it cannot be read): (3, S, S) float32."""
        return (centre_square(image, self.size).float() / 255 - self.mean) / self.std


def read_picture(path: str) -> images.Decoded:
    """Read an image, or its array, as a picture to look at; errors as of ``read_square``."""
    if not images.is_npz(path):
        return images.read_image(path)
    array = arrays.read_array(path)
    return images.Decoded(as_picture(array), () if array.dtype == np.uint8 else (NORMALISED,))


def as_picture(array: np.ndarray) -> Image.Image:
    """A (3, H, W) array as a picture; of floats, whose mean and deviation no file says, the greatest value is white."""
    if array.dtype != np.uint8:
        values = array.astype(np.float32)
        values -= values.min()
        array = (values * (255 / max(values.max(), np.float32(1e-6)))).astype(np.uint8)
    # Plane by plane: a sixth of the time of turning the array's axes round.
    return Image.merge("RGB", [Image.fromarray(plane) for plane in array])


def _require_plain(path: str, array: np.ndarray, size: int) -> None:
    square = Square.of(size)
    if array.dtype == np.uint8 and (square.squashed or square.whole not in (0, size) or square.resampling != "bicubic"):
        how = "both sides" if square.squashed else "the shorter side"
        raise UserError(
            f"{path}: a picture whose shorter side was resized to {size} by bicubic interpolation; this model takes "
            f"{how} resized to {square.whole or size} by {square.resampling}, of the image itself. Train on the "
            "images: move npz/ away."
        )


def _require_size(path: str, array: np.ndarray, size: int) -> None:
    _, height, width = array.shape
    sides = {min(height, width)} if array.dtype == np.uint8 else {height, width}
    if sides != {size}:
        raise UserError(
            f"{path}: was made for another model: it has {width}×{height} pixels; expected {size} on the shorter "
            f"side, or {size}×{size} if they are normalized. Train a model of that size (--image_size), or move the "
            f"file away and write the arrays again: train-clip data npz FOLDER --image_size {size}"
        )
