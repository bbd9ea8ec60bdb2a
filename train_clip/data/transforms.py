"""Pictures → squares of bytes.

Training crops at random; evaluation resizes and crops the centre, bit for bit as OpenAI's preprocessing does with
Pillow. Pixels stay uint8: they are normalised on the device.

S  side of the square in pixels
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

BICUBIC = Image.Resampling.BICUBIC


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to S, then the S×S in the middle (openai/CLIP, clip.py, _transform).

    Args:
        picture: RGB.
        size: S.
    """
    picture = resize_shorter(picture, size)
    # torchvision's CenterCrop rounds halves to even, as round() does.
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def random_crop(picture: Image.Image, size: int, rng: Generator) -> Image.Image:
    """Shorter side to S, then an S×S at random: the paper's only augmentation (CLIP paper, section 2.4).

    Args:
        picture: RGB.
        size: S.
        rng: draws the place.
    """
    picture = resize_shorter(picture, size)
    left = int(rng.integers(picture.width - size + 1))
    top = int(rng.integers(picture.height - size + 1))
    return picture.crop((left, top, left + size, top + size))


def random_resized_crop(picture: Image.Image, size: int, rng: Generator, min_share: float) -> Image.Image:
    """A square of a random share of the largest one that fits, resized to S×S: train-CLIP's crop.

    On square pictures this is torchvision's ``RandomResizedCrop(scale=(min_share, 1), ratio=(1, 1))``. That takes
    shares of the whole picture's area, for which a 3:2 photograph has no room from 0.75 up, and then cuts the centre.

    Args:
        picture: RGB.
        size: S.
        rng: draws share and place.
        min_share: least share of the largest square's area, in (0, 1].
    """
    width, height = picture.size
    side = max(1, round(min(width, height) * math.sqrt(rng.uniform(min_share, 1.0))))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return picture.crop((left, top, left + side, top + side)).resize((size, size), BICUBIC)


def resize_shorter(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to S; the longer one cut to whole pixels, as torchvision's Resize does.

    A picture whose shorter side is S is returned as it is, so that doing it twice is doing it once.

    Args:
        picture: RGB.
        size: S.
    """
    width, height = picture.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    return picture if target == picture.size else picture.resize(target, BICUBIC)


def to_tensor(picture: Image.Image) -> Tensor:
    """Map an RGB picture to (3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
