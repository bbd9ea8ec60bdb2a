"""Samples → a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from train_clip.data.samples import Sample
from train_clip.data.tokenizer import Tokenizer
from train_clip.types import Batch


class Collate:
    """Stack the pixels, tokenize the captions.

    Args:
        tokenizer: CLIP's, or any Hugging Face tokenizer, which is asked for padded and truncated PyTorch tensors.
    """

    def __init__(self, tokenizer: Tokenizer | Callable[..., Any]) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return a ``Batch``: images (B, 3, S, S) uint8, texts (B, L) int64 or the tokenizer's own mapping."""
        captions = [sample.caption for sample in samples]
        num_cut = 0
        if isinstance(self.tokenizer, Tokenizer):
            texts, num_cut = self.tokenizer.batch(captions)
        else:
            texts = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        skips = tuple(sample.skips for sample in samples if sample.skips)
        missing = tuple(row for row, sample in enumerate(samples) if sample.missing)
        return Batch(torch.stack([sample.pixels for sample in samples]), texts, skips, num_cut, missing)
