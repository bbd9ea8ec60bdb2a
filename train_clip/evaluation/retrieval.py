"""Retrieval: how often the right one is among the k most similar, both ways.

N  images      M  captions      D  embedding width      U  different captions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train_clip.losses.softmax import ranks

KS = (1, 5, 10)  # CLIP paper, table 13
ROWS_AT_ONCE = 1024  # bounds memory to this many rows of similarities


@dataclass(frozen=True)
class Retrieval:
    """Recall at each k, as shares in [0, 1], beside what a random order would give."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]


def retrieval(images: Tensor, texts: Tensor, owners: Tensor, caption_ids: Tensor, ks: Sequence[int] = KS) -> Retrieval:
    """Score every image against every caption.

    An image counts as found when any caption that says the same as one of its own is among the first k, a caption when
    any image that has it is. Ties and NaN count against (``ranks``): a model that maps all to one point finds nothing.

    Args:
        images: (N, D) float, unit norm.
        texts: (M, D) float, unit norm.
        owners: (M,) int64, the image of each caption.
        caption_ids: (M,) int64, equal for equal captions.
        ks: the ranks at which recall is taken.
    """
    _, caption_ids = torch.unique(caption_ids, return_inverse=True)
    image_ranks, image_matches, text_ranks, text_matches = [], [], [], []
    for rows in torch.arange(len(images), device=images.device).split(ROWS_AT_ONCE):
        right = _has_caption(rows, owners, caption_ids)[:, caption_ids]
        image_ranks.append(ranks(images[rows], texts, right))
        image_matches.append(right.sum(dim=1))
    for rows in torch.arange(len(texts), device=texts.device).split(ROWS_AT_ONCE):
        right = _has_image(caption_ids[rows], owners, caption_ids, len(images))
        text_ranks.append(ranks(texts[rows], images, right))
        text_matches.append(right.sum(dim=1))
    return Retrieval(
        _recall(torch.cat(image_ranks), ks),
        _recall(torch.cat(text_ranks), ks),
        _chance(torch.cat(image_matches), len(texts), ks),
        _chance(torch.cat(text_matches), len(images), ks),
    )


def _has_caption(rows: Tensor, owners: Tensor, caption_ids: Tensor) -> Tensor:
    """(rows, U) bool: which images have which caption. ``rows`` are consecutive."""
    table = torch.zeros(len(rows), int(caption_ids.max()) + 1, dtype=torch.bool, device=rows.device)
    mine = (owners >= rows[0]) & (owners <= rows[-1])
    table[owners[mine] - rows[0], caption_ids[mine]] = True
    return table


def _has_image(wanted: Tensor, owners: Tensor, caption_ids: Tensor, num_images: int) -> Tensor:
    """(rows, N) bool: which images have a caption equal to each of the wanted ones."""
    different, inverse = torch.unique(wanted, return_inverse=True)
    place = torch.full((int(caption_ids.max()) + 1,), -1, device=wanted.device)
    place[different] = torch.arange(len(different), device=wanted.device)
    mine = place[caption_ids] >= 0
    table = torch.zeros(len(different), num_images, dtype=torch.bool, device=wanted.device)
    table[place[caption_ids[mine]], owners[mine]] = True
    return table[inverse]


def _recall(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    return {k: (ranks < k).cpu().double().mean().item() for k in ks}


def _chance(matches: Tensor, candidates: int, ks: Sequence[int]) -> dict[int, float]:
    """Mean over queries of 1 - C(candidates - matches, k) / C(candidates, k)."""
    chances = {}
    for k in ks:
        # On the CPU: some devices (MPS) have no float64.
        wrong = (candidates - matches).cpu().double()
        missed = torch.ones_like(wrong)
        for drawn in range(min(k, candidates)):
            missed *= ((wrong - drawn) / (candidates - drawn)).clamp(min=0)
        chances[k] = (1 - missed).mean().item()
    return chances
