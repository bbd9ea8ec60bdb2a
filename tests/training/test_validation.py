"""The validation split on one process: what is scored and what only holds a place."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from train_clip import CLIPWrapper
from train_clip.data.samples import Batch
from train_clip.training.validation import ValidationSplit, interleave

SCALE = torch.tensor(14.0)


def test_rows_that_hold_a_place_are_not_scored():
    """Two of eight rows missing: loss and recalls of the other six alone, in batches of as many."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(8, 4, generator=generator), dim=-1)
    texts = F.normalize(images + 0.7 * torch.randn(8, 4, generator=generator), dim=-1)
    captions = torch.arange(8) + 2
    present = [0, 1, 3, 4, 5, 7]
    with_gaps, without = ValidationSplit(4), ValidationSplit(4)
    with_gaps.add(images, texts, captions, missing=(2, 6))
    without.add(images[present], texts[present], captions[present])
    complete = ValidationSplit(4)
    complete.add(images, texts, captions)
    expected = without.score(SCALE)
    assert with_gaps.score(SCALE) == expected
    assert complete.score(SCALE) != expected


def test_only_a_samplers_padding_is_cut():
    """Five rows shared among two processes are six, of which one is cut; two whole copies of four are left whole."""
    shared = [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 0])]
    assert interleave(shared, 5).tolist() == [0, 1, 2, 3, 4]
    apart = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    assert interleave(apart, 4).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_step_passes_on_which_rows_are_missing(tiny_config):
    """Of three pairs the last could not be read, and only holds its place."""
    module = CLIPWrapper("tiny", tiny_config)
    texts = module.tokenizer.batch(["a", "b", ""])[0]
    module.validation_step(Batch(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), texts, missing=(2,)), 0)
    *_, present = module._splits[0][0]._batches[0]
    assert present.tolist() == [True, True, False]
