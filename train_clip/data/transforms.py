"""Pictures → squares of bytes, as evaluation takes them: bit for bit OpenAI's preprocessing with Pillow.

Training draws its crops in windows.py. Pixels stay uint8: they are normalised on the device.

S  side of the square in pixels
"""

from __future__ import annotations

import numpy as np
import torch
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


def resize_shorter(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to S; the longer one cut to whole pixels, as torchvision's Resize does.

    A picture whose shorter side is S is returned as it is, so that doing it twice is doing it once.

    Args:
        picture: RGB.
        size: S.
    """
    target = shorter_to(picture.size, size)
    return picture if target == picture.size else picture.resize(target, BICUBIC)


def shorter_to(picture: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter side becomes S.

    Args:
        picture: its width and height.
        size: S.
    """
    width, height = picture
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def to_tensor(picture: Image.Image) -> Tensor:
    """Map an RGB picture to (3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
