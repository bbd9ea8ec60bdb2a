"""Which classes images are taken for, against loops over images and classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.evaluation.zero_shot import zero_shot
from train_clip.losses import tiles
from train_clip.scores.confusion import confusion

N, C, D = 40, 8, 6
NAMES = [f"class {place}" for place in range(C)]


def embed(rows: int, seed: int, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1)


@pytest.mark.parametrize("tile", [0, 3 * C, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed, tile, monkeypatch):
    """How many images of each class are taken for which; a class that has none and is taken for none is left out."""
    monkeypatch.setattr(tiles, "TILE", tile)
    labels = torch.randint(C - 1, (N,), generator=torch.Generator().manual_seed(seed))
    classes = embed(C, seed)
    images = F.normalize(classes[labels] + 1.2 * embed(N, seed + 50), dim=-1)
    expected: dict[tuple[str, str], int] = {}
    for image, label in zip(images.tolist(), labels.tolist(), strict=True):
        similarities = [math.fsum(a * b for a, b in zip(image, other, strict=True)) for other in classes.tolist()]
        cell = NAMES[label], NAMES[similarities.index(max(similarities))]
        expected[cell] = expected.get(cell, 0) + 1
    matrix, names = confusion(images, zero_shot(images, labels, classes), NAMES)
    assert names == [name for name in NAMES if any(name in cell for cell in expected)]
    assert {
        (own, other): number
        for own, row in zip(names, matrix.tolist(), strict=True)
        for other, number in zip(names, row, strict=True)
        if number
    } == expected


def test_a_collapsed_model_confuses_every_image():
    """All classes at one point: no image stands on the diagonal, as none counts as right."""
    images, labels = embed(N, 0), torch.arange(N) % C
    matrix, names = confusion(images, zero_shot(images, labels, embed(1, 1).repeat(C, 1)), NAMES)
    assert matrix.diagonal().sum() == 0 and matrix.sum() == N and names == NAMES
