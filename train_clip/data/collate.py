"""Samples → a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from train_clip.data.samples import Sample
from train_clip.types import Batch


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
