"""Which captions are equal, against a comparison of their tokens one by one.

B  captions      L  tokens of the longest
"""

from __future__ import annotations

import torch
from torch import Tensor

from train_clip.models.clip import caption_ids


def equal(numbers: Tensor) -> list[list[bool]]:
    return (numbers[:, None] == numbers).tolist()


def padded(captions: list[list[int]], length: int, left: bool = False, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and what of them is no padding, (B, length)."""
    ids = torch.full((len(captions), length), filler)
    mask = torch.zeros(len(captions), length, dtype=torch.bool)
    for row, caption in enumerate(captions):
        place = slice(length - len(caption), length) if left else slice(0, len(caption))
        ids[row, place], mask[row, place] = torch.tensor(caption, dtype=torch.int64), True
    return ids, mask


CAPTIONS = [
    [5, 6, 7],
    [7, 6, 5],
    [5, 6],
    [5, 6, 7],
    [5, 6, 7, 0],
    [0],
    [0, 0],
    [5, 5, 6, 7],
    [6, 5, 7],
    [2, 0],
    [0],
    [],
]


def test_equal_tokens_and_no_others():
    """Repeats, other orders, beginnings of one another, token 0 (which is padding elsewhere), and no token at all."""
    expected = [[one == two for two in CAPTIONS] for one in CAPTIONS]
    assert equal(caption_ids(*padded(CAPTIONS, 6))) == expected


def test_padding_of_any_kind_is_not_looked_at():
    """On either side, of any token, to any length: the numbers are the same, as between ranks they have to be."""
    numbers = caption_ids(*padded(CAPTIONS, 4))
    for length in (4, 5, 16, 17, 77, 512):
        for left in (False, True):
            for filler in (0, 9, 49_407):
                assert torch.equal(caption_ids(*padded(CAPTIONS, length, left, filler)), numbers)


def test_captions_that_differ_in_one_token():
    """All 30,000 captions of three tokens whose last one differs, and of long ones at any place: all different."""
    ids = torch.tensor([[101, 2003, 0]]).repeat(30_000, 1)
    ids[:, 2] = torch.arange(30_000)
    assert len(caption_ids(ids, torch.ones_like(ids, dtype=torch.bool)).unique()) == 30_000
    long = torch.full((512, 512), 250_000)
    long[torch.arange(512), torch.arange(512)] = 249_999
    assert len(caption_ids(long, torch.ones_like(long, dtype=torch.bool)).unique()) == 512


def test_random_captions_against_their_tokens():
    """Short captions over three tokens, of which many are equal: as Python compares lists."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 5, (200,), generator=generator).tolist()
    captions = [torch.randint(0, 3, (length,), generator=generator).tolist() for length in lengths]
    assert equal(caption_ids(*padded(captions, 5))) == [[one == two for two in captions] for one in captions]
