"""Pairs → samples. What is drawn depends on (seed, epoch, index) alone, never on the worker or on what came before.

S  side of the square in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from train_clip.data.images import open_rgb
from train_clip.data.pairs import Pair
from train_clip.data.transforms import center_crop, random_crop, random_resized_crop, to_tensor
from train_clip.errors import BadSample, UserError
from train_clip.types import Skip

MAX_SUBSTITUTES = 100  # where this many draws in a row are bad, nearly all the data is


class Sample(NamedTuple):
    """One pair as the model meets it.

    Args:
        pixels: (3, S, S) uint8.
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
    """

    def __init__(self, pairs: Sequence[Pair], augmentation: Augmentation) -> None:
        self.pairs = pairs
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """Draw pair ``index`` as it is in ``epoch``; the epoch travels in the key because workers outlive epochs.

        A plain index, which is what Lightning's ``overfit_batches`` asks for, is drawn as in epoch 0 each time.
        """
        epoch, index = (0, key) if isinstance(key, int) else key
        return _draw_or_substitute(self.pairs, index, self.augmentation, epoch)


def draw(pair: Pair, how: Augmentation, rng: Generator) -> tuple[Tensor, str]:
    """Draw a crop, (3, S, S) uint8, and a caption line of a pair.

    Raises:
        BadSample: a file of the pair cannot be used.
    """
    captions = pair.captions()
    caption = captions[int(rng.integers(len(captions)))]
    picture = open_rgb(pair.image)
    if how.resize_ratio is None:
        return to_tensor(random_crop(picture, how.size, rng)), caption
    return to_tensor(random_resized_crop(picture, how.size, rng, how.resize_ratio)), caption


class ValidationPairs(Dataset[Sample]):
    """The centre crop and the first caption line of each pair.

    Args:
        pairs: at least one.
        size: S.
    """

    def __init__(self, pairs: Sequence[Pair], size: int) -> None:
        self.pairs = pairs
        self.size = size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read pair ``index``; black pixels and no caption hold its place where it cannot be read."""
        pair = self.pairs[index]
        try:
            return Sample(to_tensor(center_crop(open_rgb(pair.image), self.size)), pair.captions()[0])
        except BadSample as bad:
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return Sample(black, "", (Skip(bad.path, bad.reason),), missing=True)


def _draw_or_substitute(pairs: Sequence[Pair], index: int, how: Augmentation, epoch: int) -> Sample:
    """Draw of a pair; where it is bad of another one, so that every batch keeps its shape on every rank."""
    rng = np.random.default_rng((how.seed, epoch, index))
    skips: list[Skip] = []
    for _ in range(MAX_SUBSTITUTES):
        try:
            pixels, caption = draw(pairs[index], how, rng)
            return Sample(pixels, caption, tuple(skips))
        except BadSample as bad:
            skips.append(Skip(bad.path, bad.reason))
            index = int(rng.integers(len(pairs)))
    raise UserError(
        f"{skips[0].path}: {skips[0].reason}; and {MAX_SUBSTITUTES - 1} substitutes drawn at random were bad as well, "
        f"the last being {skips[-1].path}: {skips[-1].reason}. Expected "
        "data of which nearly all can be read; `train-clip data check` lists what cannot."
    )
