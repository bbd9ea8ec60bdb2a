"""Images alone, for scoring: the centre crop of each, in order, without substitutes.

S  side of the square in pixels

How many cores this process may use.

Pairs → samples. What is drawn depends on (seed, epoch, index) alone, never on the worker or on what came before.

S  side of the square in pixels

Samples → a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train_clip.data.crops import center_crop, kind_of, random_crop, random_resized_crop, read_square, read_window
from train_clip.data.pairs import Pair
from train_clip.errors import BadSample, UserError
from train_clip.types import Batch, Skip


def available_cores() -> int:
    """Cores that this process may use."""
    # Where there is no affinity (macOS, Windows) all cores are free.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class BatchTokenizer(Protocol):
    """CLIP's ``Tokenizer``, or a ``PretrainedTokenizer``."""

    def batch(self, texts: list[str]) -> tuple[Any, int]:
        """Tokens of captions, as the text encoder takes them, and how many captions were cut."""
        ...


class Collate:
    """Stack the pixels, tokenize the captions.

    Args:
        tokenizer: the text encoder's.
    """

    def __init__(self, tokenizer: BatchTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return a ``Batch``: images (B, 3, S, S) of the samples' dtype, texts (B, L) int64 or a mapping."""
        texts, num_cut = self.tokenizer.batch([sample.caption for sample in samples])
        skips = tuple(sample.skips for sample in samples if sample.skips)
        missing = tuple(row for row, sample in enumerate(samples) if sample.missing)
        return Batch(torch.stack([sample.pixels for sample in samples]), texts, skips, num_cut, missing)


class ImageList(Dataset["tuple[int, Tensor | Skip]"]):
    """The pixels of each file, or why it cannot be read.

    Args:
        paths: images, or ``.npz`` files of them.
        size: S.

    Raises:
        UserError: here or when one is read, arrays that do not fit: see ``read_square`` and ``PixelKind``.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths = paths
        self.size = size
        self.kind = kind_of(paths, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skip]:
        """The index with (3, S, S) pixels, or with what is wrong with the file."""
        path = self.paths[index]
        try:
            return index, self.kind.require(read_square(path, self.size, partial(center_crop, size=self.size)), path)
        except BadSample as bad:
            return index, Skip(bad.path, bad.reason)


def image_loader(paths: Sequence[str], size: int, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Load images in batches of (indices, (B, 3, S, S) pixels, skips); bad files are in the skips alone."""
    return DataLoader(ImageList(paths, size), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)


def _collate(samples: list[tuple[int, Tensor | Skip]]) -> tuple[list[int], Tensor, list[Skip]]:
    good = [(index, pixels) for index, pixels in samples if isinstance(pixels, Tensor)]
    skips = [skip for _, skip in samples if isinstance(skip, Skip)]
    pixels = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0)
    return [index for index, _ in good], pixels, skips
