"""Pairs → samples. What is drawn depends on (seed, epoch, index) alone, never on the worker or on what came before.

S  side of the square in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from train_clip.data.pairs import Pair
from train_clip.data.pixels import kind_of, read_square, read_window
from train_clip.data.transforms import center_crop
from train_clip.data.windows import random_crop, random_resized_crop
from train_clip.errors import BadSample, UserError
from train_clip.types import Skip

MAX_SUBSTITUTES = 100  # where this many draws in a row are bad, nearly all the data is


class Sample(NamedTuple):
    """One pair as the model meets it.

    Args:
        pixels: (3, S, S) uint8, or float32 that is already normalised.
        caption: one line.
        skips: what could not be read on the way to this sample.
        missing: whether it only holds a place.
    """

    pixels: Tensor
    caption: str
    skips: tuple[Skip, ...] = ()
    missing: bool = False


@dataclass(frozen=True)
class Augmentation:
    """How a training sample is drawn.

    Args:
        size: S.
        resize_ratio: least share of the area that the crop keeps; None for the paper's crop.
        seed: with epoch and index it decides crop and caption.
    """

    size: int
    resize_ratio: float | None
    seed: int


class TrainingPairs(Dataset[Sample]):
    """A random crop and a random caption line of each pair.

    Args:
        pairs: at least one.
        augmentation: see there.

    Raises:
        UserError: here or when a sample is drawn, arrays that do not fit: see ``read_square`` and ``PixelKind``.
    """

    def __init__(self, pairs: Sequence[Pair], augmentation: Augmentation) -> None:
        self.pairs = pairs
        self.augmentation = augmentation
        self.kind = kind_of((pair.pixels for pair in pairs), augmentation.size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """Draw pair ``index`` as it is in ``epoch``; the epoch travels in the key because workers outlive epochs.

        A plain index, which is what Lightning's ``overfit_batches`` asks for, is drawn as in epoch 0 each time.
        """
        epoch, index = (0, key) if isinstance(key, int) else key
        return _draw_or_substitute(self, index, epoch)


def draw(pair: Pair, how: Augmentation, rng: Generator) -> tuple[Tensor, str]:
    """Draw a crop, (3, S, S), and a caption line of a pair.

    Raises:
        BadSample: a file of the pair cannot be used.
        UserError: an array that was made for another S.
    """
    captions = pair.captions()
    caption = captions[int(rng.integers(len(captions)))]
    if how.resize_ratio is None:
        window = partial(random_crop, size=how.size, rng=rng)
    else:
        window = partial(random_resized_crop, size=how.size, rng=rng, min_share=how.resize_ratio)
    return read_window(pair.pixels, how.size, window), caption


class ValidationPairs(Dataset[Sample]):
    """The centre crop and the first caption line of each pair.

    Args:
        pairs: at least one.
        size: S.

    Raises:
        UserError: as ``TrainingPairs``.
    """

    def __init__(self, pairs: Sequence[Pair], size: int) -> None:
        self.pairs = pairs
        self.size = size
        self.kind = kind_of((pair.pixels for pair in pairs), size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read pair ``index``; black pixels and no caption hold its place where it cannot be read."""
        pair = self.pairs[index]
        try:
            pixels = read_square(pair.pixels, self.size, partial(center_crop, size=self.size))
            return Sample(self.kind.require(pixels, pair.pixels), pair.captions()[0])
        except BadSample as bad:
            black = torch.zeros(3, self.size, self.size, dtype=self.kind.dtype)
            return Sample(black, "", (Skip(bad.path, bad.reason),), missing=True)


def _draw_or_substitute(data: TrainingPairs, index: int, epoch: int) -> Sample:
    """Draw of a pair; where it is bad of another one, so that every batch keeps its shape on every rank."""
    rng = np.random.default_rng((data.augmentation.seed, epoch, index))
    skips: list[Skip] = []
    for _ in range(MAX_SUBSTITUTES):
        pair = data.pairs[index]
        try:
            pixels, caption = draw(pair, data.augmentation, rng)
            return Sample(data.kind.require(pixels, pair.pixels), caption, tuple(skips))
        except BadSample as bad:
            skips.append(Skip(bad.path, bad.reason))
            index = int(rng.integers(len(data.pairs)))
    raise UserError(
        f"{skips[0].path}: {skips[0].reason}; and {MAX_SUBSTITUTES - 1} substitutes drawn at random were bad as well, "
        f"the last being {skips[-1].path}: {skips[-1].reason}. Expected "
        "data of which nearly all can be read; `train-clip data check` lists what cannot."
    )
