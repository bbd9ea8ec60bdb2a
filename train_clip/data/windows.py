"""Training crops: drawn from a picture's size alone, then cut out of its pixels, which may have been decoded smaller.

Resized by PyTorch's bicubic with antialiasing, in a third of Pillow's time. The two are equal to within 3 of 255 where
neither has to clip between its passes, which they take in different orders.

S  side of the square in pixels      H, W  of the pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from train_clip.data.transforms import shorter_to

REDUCTIONS = (8, 4, 2)  # at which libjpeg's inverse transform is smaller by as much and as exact (jdct.h)


class Window(NamedTuple):
    """A box of a picture, what it is resized to, and the square that is cut out of that.

    Args:
        box: left, top, right and bottom in pixels of the upright picture.
        target: width and height that the box is resized to.
        place: left and top of the square within them.
        size: S.
    """

    box: tuple[int, int, int, int]
    target: tuple[int, int]
    place: tuple[int, int]
    size: int

    @property
    def reduction(self) -> int:
        """By how much the picture may be smaller than it is, for the box to be no smaller than its target."""
        left, top, right, bottom = self.box
        room = min((right - left) / self.target[0], (bottom - top) / self.target[1])
        return next((reduction for reduction in REDUCTIONS if reduction <= room), 1)


# Draws a window in a picture of a width and a height.
Draw = Callable[[tuple[int, int]], Window]


def random_crop(picture: tuple[int, int], size: int, rng: Generator) -> Window:
    """Shorter side to S, then an S×S at random: the paper's only augmentation (CLIP paper, section 2.4).

    Args:
        picture: its width and height.
        size: S.
        rng: draws the place.
    """
    target = shorter_to(picture, size)
    left, top = int(rng.integers(target[0] - size + 1)), int(rng.integers(target[1] - size + 1))
    return Window((0, 0, *picture), target, (left, top), size)


def random_resized_crop(picture: tuple[int, int], size: int, rng: Generator, min_share: float) -> Window:
    """A square of a random share of the largest one that fits, resized to S×S: train-CLIP's crop.

    On square pictures this is torchvision's ``RandomResizedCrop(scale=(min_share, 1), ratio=(1, 1))``. That takes
    shares of the whole picture's area, for which a 3:2 photograph has no room from 0.75 up, and then cuts the centre.

    Args:
        picture: its width and height.
        size: S.
        rng: draws share and place.
        min_share: least share of the largest square's area, in (0, 1].
    """
    width, height = picture
    side = max(1, round(min(width, height) * math.sqrt(rng.uniform(min_share, 1.0))))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return Window((left, top, left + side, top + side), (size, size), (0, 0), size)


def cut(pixels: NDArray[Any], window: Window, reduction: int = 1) -> Tensor:
    """Resize the window's box and cut its square.

    Args:
        pixels: (3, H, W) uint8, in any order in memory.
        window: in the picture as it was before it was reduced.
        reduction: by how much the pixels are fewer along each side.

    Returns:
        (3, S, S) uint8.
    """
    left, top, right, bottom = (reduced(edge, reduction) for edge in window.box)
    box = torch.from_numpy(np.require(pixels[:, top:bottom, left:right], requirements="W"))
    wide, high = window.target
    if box.shape[1:] != (high, wide):
        (box,) = F.interpolate(box[None], (high, wide), mode="bicubic", antialias=True)
    left, top = window.place
    return box[:, top : top + window.size, left : left + window.size].contiguous()


def reduced(edge: int, reduction: int) -> int:
    """Which of the fewer pixels is nearest; half-way the later one, so that no box is smaller than it may be."""
    return (edge + reduction // 2) // reduction
