"""Zero-shot classification against loops over images and classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.evaluation import zero_shot as module
from train_clip.evaluation.zero_shot import DEFAULT_TEMPLATES, class_embeddings, zero_shot
from train_clip.losses import tiles

N, C, D = 40, 8, 6


def embed(rows: int, seed: int, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1)


def naive_ranks(images: Tensor, labels: list[int], classes: Tensor) -> list[int]:
    """How many other classes are at least as similar to each image as its own."""
    ranks = []
    for image, label in zip(images.tolist(), labels, strict=True):
        similarities = [math.fsum(a * b for a, b in zip(image, other, strict=True)) for other in classes.tolist()]
        ranks.append(sum(s >= similarities[label] for place, s in enumerate(similarities) if place != label))
    return ranks


@pytest.mark.parametrize("tile", [0, 3 * C, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed, tile, monkeypatch):
    """Top-1, top-5 and the mean over classes; images of unequal numbers, and of one class none: 1e-12.

    All images at once, three, and one at a time.
    """
    monkeypatch.setattr(tiles, "TILE", tile)
    labels = torch.randint(C - 1, (N,), generator=torch.Generator().manual_seed(seed)).clamp(min=1).tolist()
    classes = embed(C, seed)
    images = F.normalize(classes[labels] + 1.2 * embed(N, seed + 50), dim=-1)
    found = zero_shot(images, torch.tensor(labels), classes)
    ranks = naive_ranks(images, labels, classes)
    assert 0 < sum(rank < 1 for rank in ranks) < N
    assert found.top1 == pytest.approx(sum(rank < 1 for rank in ranks) / N, abs=1e-12)
    assert found.top5 == pytest.approx(sum(rank < 5 for rank in ranks) / N, abs=1e-12)
    by_class = [[rank < 1 for rank, label in zip(ranks, labels, strict=True) if label == c] for c in set(labels)]
    mean = sum(sum(hits) / len(hits) for hits in by_class) / len(by_class)
    assert len(by_class) < C and mean != found.top1
    assert found.mean_per_class == pytest.approx(mean, abs=1e-12)
    assert (found.chance, found.num_images, found.num_classes) == (1 / C, N, C)
    shares = {str(c): sum(hits) / len(hits) for c, hits in zip(set(labels), by_class, strict=True)}
    assert found.per_class == pytest.approx(shares, abs=1e-12)


def test_ties_count_against():
    """Embeddings on the axes against the loop, where a class that is as similar comes first."""
    axes = torch.eye(D, dtype=torch.float64)
    images, labels = axes[[0, 1, 2, 3, 0]], [0, 1, 2, 3, 4]
    classes = axes[[0, 1, 1, 3, 5, 5]]
    ranks = naive_ranks(images, labels, classes)
    found = zero_shot(images, torch.tensor(labels), classes)
    assert ranks == [0, 1, 5, 0, 5]
    assert (found.top1, found.top5) == (2 / 5, 3 / 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 33, 130, 512, 768, 1024])
def test_a_collapsed_model_scores_nothing(width, dtype):
    """All classes at one point: 0, not what the first class would score, nor what a kernel's rounding picks."""
    images, point = (embed(rows, seed, width).to(dtype) for seed, rows in enumerate((N, 1)))
    found = zero_shot(images, torch.arange(N) % C, point.repeat(C, 1))
    assert found.top1 == found.top5 == found.mean_per_class == 0


@pytest.mark.parametrize("spoiled", ["images", "classes"])
def test_not_a_number_is_not_right(spoiled):
    """Embeddings that are NaN score 0: a model that diverged does not classify everything."""
    images, classes = embed(N, 0), embed(C, 1)
    (images if spoiled == "images" else classes)[:] = torch.nan
    found = zero_shot(images, torch.arange(N) % C, classes)
    assert found.top1 == found.top5 == found.mean_per_class == 0


@pytest.mark.parametrize("captions", [1, 6, 4096])
def test_class_embeddings(captions, monkeypatch):
    """Each template normalised, averaged, normalised again (CLIP paper, section 3.1.4), against loops: 1e-12.

    A class at a time, two, and all.
    """
    monkeypatch.setattr(module, "CAPTIONS_AT_ONCE", captions)
    names, templates = ["cat", "red bus", "{}"], ["a photo of a {}.", "{}", "the {}, and again a {}"]
    vectors: dict[str, Tensor] = {}

    def embed_texts(captions: list[str]) -> Tensor:
        for caption in captions:
            vectors.setdefault(caption, embed(1, len(vectors))[0])
        return torch.stack([vectors[caption] for caption in captions])

    found = class_embeddings(names, templates, embed_texts)
    assert found.shape == (3, D)
    sentences = {
        "cat": ["a photo of a cat.", "cat", "the cat, and again a cat"],
        "red bus": ["a photo of a red bus.", "red bus", "the red bus, and again a red bus"],
        "{}": ["a photo of a {}.", "{}", "the {}, and again a {}"],
    }
    for row, name in zip(found.tolist(), names, strict=True):
        mean = [sum(column) / 3 for column in zip(*(vectors[s].tolist() for s in sentences[name]), strict=True)]
        assert row == pytest.approx([value / math.hypot(*mean) for value in mean], abs=1e-12)


def test_default_template():
    """The paper's own sentence."""
    assert DEFAULT_TEMPLATES == ("a photo of a {}.",)
