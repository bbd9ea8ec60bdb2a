"""Pairs → samples → batches. Random choices depend only on (seed, epoch, index), never on worker or machine.

N  pairs      G, B  pairs of a global batch, of one process      W  processes      L  tokens      S  side in pixels

An epoch is a permutation of the pairs cut into N // G global batches of G; process r reads the r-th of W equal slices
of each. The N mod G pairs that are left over differ from epoch to epoch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from train_clip.data import crops, images, workers
from train_clip.data.pairs import IN_TABLE, Pair, PairList
from train_clip.data.scan import fault_of
from train_clip.errors import BadSample, UserError


class Skip(NamedTuple):
    """A sample that could not be read and was replaced by another."""

    path: str  # the file that was at fault
    reason: str  # the same words for the same fault


class Batch(NamedTuple):
    """One process's part of a global batch. Any other batch that starts with images and texts works too."""

    images: torch.Tensor  # (B, 3, H, W) uint8 in [0, 255], or float that is already normalized
    texts: Any  # (B, L) int64 tokens, or whatever the text encoder takes
    skips: tuple[tuple[Skip, ...], ...] = ()  # of each sample that was replaced, the bad files on the way to another
    num_cut: int = 0  # captions that were longer than the text encoder's context
    missing: tuple[int, ...] = ()  # rows that only hold the place of a pair that could not be read (validation)


KINDS = {torch.uint8: "a picture", torch.float32: crops.NORMALISED}
MAX_SUBSTITUTES = 100  # where this many draws in a row are bad, nearly all the data is
NUM_LOOKED_FOR = 100  # files, or up to twice as many: where none is there, the fault is in none of them


class GlobalBatchSampler(DistributedSampler[Any]):
    """This process's (epoch, index) keys of as many global batches as an epoch has, from the next one on.

    A ``DistributedSampler`` so that Lightning leaves it in place. The position is what was consumed at ``iter()``, not
    ``set_epoch``'s, which comes too late for a loader that prefetches. Iteration that begins within an epoch runs on
    into the next: the Trainer stops it by its own count, and no batch is left out.

    ``global_batch`` is G, a multiple of W; ``consumed`` gives how many have been trained on, or None where nobody
    counts, and each ``iter()`` is an epoch, the next one or ``set_epoch``'s; ``process`` is (rank, W).
    """

    def __init__(
        self,
        pairs: PairList,
        global_batch: int,
        consumed: Callable[[], int | None],
        shuffle: bool,
        seed: int,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        rank, world_size = process
        dataset: Any = pairs  # of which only the length is asked
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.global_batch = global_batch
        self.consumed = consumed
        self.share = global_batch // world_size
        self.pairs, self.num_pairs = pairs, pairs.per_epoch
        self.batches_per_epoch = self.num_pairs // global_batch

    def __len__(self) -> int:
        return self.batches_per_epoch * self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.consumed()
        if first is None:
            first = self.epoch * self.batches_per_epoch
            self.epoch += 1
        return self._keys(first)

    def _keys(self, first: int) -> Iterator[tuple[int, int]]:
        for position in range(first, first + self.batches_per_epoch):
            epoch, batch = divmod(position, self.batches_per_epoch)
            if batch == 0 or position == first:
                order = self.pairs.order(self.seed, epoch) if self.shuffle else np.arange(self.num_pairs)
            start = batch * self.global_batch + self.rank * self.share
            for index in order[start : start + self.share].tolist():
                yield epoch, index


class Sample(NamedTuple):
    """One pair as the model meets it."""

    pixels: torch.Tensor  # (3, S, S) uint8, or float32 that is already normalized
    caption: str  # one line
    skips: tuple[Skip, ...] = ()  # what could not be read on the way to this sample
    missing: bool = False  # whether it only holds a place


class _Pairs(Dataset[Sample]):
    def __init__(self, pairs: Sequence[Pair], size: int) -> None:
        self.pairs, self.size = pairs, size
        self.dtype, self.example = _first_kind(pairs, size)

    def __len__(self) -> int:
        return len(self.pairs)

    def require_there(self, bad: BadSample, index: int) -> None:
        """A ``UserError`` where neither the bad file nor any other is there: a lost mount, a folder that moved."""
        kind = "caption" if bad.path == self.pairs[index].caption else "pixels"
        others = [getattr(self.pairs[one], kind) for one in range(0, len(self), max(1, len(self) // NUM_LOOKED_FOR))]
        if not (why := fault_of(bad.path)) or not all(map(fault_of, others)):
            return
        gone = (str(one) for one in reversed(Path(bad.path).parents) if not os.path.exists(one))  # noqa: PTH110, raises nothing
        raise UserError(
            f"{next(gone, bad.path)}: {why}, as of all {len(others)} files of the data that were looked for. Expected "
            "data that stay where they were at the start: bring the folder or its mount back."
        )

    def require_one_kind(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        """The pixels, or a ``UserError`` where they are normalized and the first file's are not, or the reverse."""
        if pixels.dtype == self.dtype:
            return pixels
        raise UserError(
            f"{self.pairs[index].pixels}: holds {KINDS[pixels.dtype]}, while {self.example} holds {KINDS[self.dtype]}. "
            "Expected one kind, because a batch holds one kind. Move the other files away; `train-clip data npz` "
            "writes arrays of pictures."
        )


def _first_kind(pairs: Sequence[Pair], size: int) -> tuple[torch.dtype, str]:
    """Uint8, or float32 that is already normalized, as the first file that can be read holds, and that file."""
    for path in (pair.pixels for pair in pairs):
        if not images.is_npz(path):
            return torch.uint8, path
        try:
            return crops.read_square(path, size).dtype, path
        except BadSample:
            continue
    return torch.uint8, ""


class TrainingPairs(_Pairs):
    """A random crop and a random caption line of each pair, at least one; without a ratio the crop is the paper's.

    Raises:
        UserError: here or when a sample is drawn, arrays that do not fit: see ``read_square`` and ``require_one_kind``.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, resize_ratio: float | None = None, seed: int = 0) -> None:
        super().__init__(pairs, size)
        self.resize_ratio, self.seed = resize_ratio, seed

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """Draw pair ``index`` as in ``epoch``, which comes in the key as workers outlive it; another where it is bad.

        A plain index, which is what Lightning's ``overfit_batches`` asks for, is drawn as in epoch 0 each time.
        """
        epoch, index = (0, key) if isinstance(key, int) else key
        rng = np.random.default_rng((self.seed, epoch, index))
        skips: list[Skip] = []
        for _ in range(MAX_SUBSTITUTES):
            try:
                pixels, caption = draw(self.pairs, index, self.size, self.resize_ratio, rng)
                return Sample(self.require_one_kind(pixels, index), caption, tuple(skips))
            except BadSample as bad:
                self.require_there(bad, index)
                skips.append(Skip(bad.path, bad.reason))
                index = int(rng.integers(len(self.pairs)))
        raise UserError(
            f"{skips[0].path}: {skips[0].reason}; and {MAX_SUBSTITUTES - 1} randomly chosen replacements were bad as "
            f"well, the last one {skips[-1].path}: {skips[-1].reason}. Expected nearly all files to be readable; "
            "`train-clip data check` lists those that are not."
        )


def draw(
    pairs: Sequence[Pair], index: int, size: int, resize_ratio: float | None, rng: np.random.Generator
) -> tuple[torch.Tensor, str]:
    """Draw of a pair as ``TrainingPairs`` does: a crop, (3, S, S), and a caption line."""
    pair = pairs[index]
    captions = pair.captions()
    caption = captions[rng.integers(len(captions))]

    if resize_ratio is None:
        window = partial(crops.random_crop, size=size, rng=rng)
    else:
        window = partial(crops.random_resized_crop, size=size, rng=rng, min_share=resize_ratio)
    return crops.read_square(pair.pixels, size, window), caption


class ValidationPairs(_Pairs):
    """The center crop and the first caption line of each of the pairs; errors as of ``TrainingPairs``."""

    def __getitem__(self, index: int) -> Sample:
        """Read pair ``index``; black pixels and no caption hold its place where it cannot be read."""
        pair = self.pairs[index]
        try:
            pixels = crops.read_square(pair.pixels, self.size)
            return Sample(self.require_one_kind(pixels, index), pair.captions()[0])
        except BadSample as bad:
            self.require_there(bad, index)
            black = torch.zeros(3, self.size, self.size, dtype=self.dtype)
            return Sample(black, "", (Skip(bad.path, bad.reason),), missing=True)


def image_loader(paths: Sequence[str], size: int, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Load images alone, in batches of (indices, (B, 3, S, S) pixels, skips); bad files are in the skips alone."""
    numbered = PairList("", paths, (f"{IN_TABLE}{index}" for index in range(len(paths))))
    images = ValidationPairs(numbered, size)
    return workers.loader(images, batch_size, num_workers, collate_fn=_collate_images)


def _collate_images(samples: list[Sample]) -> tuple[list[int], torch.Tensor, list[Skip]]:
    good = [sample for sample in samples if not sample.missing]
    pixels = torch.stack([sample.pixels for sample in good]) if good else torch.empty(0)
    return [int(sample.caption) for sample in good], pixels, [skip for sample in samples for skip in sample.skips]


def collate(tokenizer: Any, samples: Sequence[Sample]) -> Batch:
    """Stack the pixels, tokenize the captions by CLIP's ``Tokenizer``, or another with its ``batch``."""
    texts, num_cut = tokenizer.batch([sample.caption for sample in samples])
    skips = tuple(sample.skips for sample in samples if sample.skips)
    missing = tuple(row for row, sample in enumerate(samples) if sample.missing)
    return Batch(torch.stack([sample.pixels for sample in samples]), texts, skips, num_cut, missing)
