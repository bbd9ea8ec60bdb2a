"""Retrieval against a double loop over similarities, and chance against every order that there is.

N  images      M  captions      D  embedding width
"""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train_clip.evaluation import retrieval as module
from train_clip.evaluation.embed import Collection
from train_clip.evaluation.retrieval import Retrieval, retrieval
from train_clip.losses import tiles

KS = (1, 2, 5)


def naive(images: Tensor, texts: Tensor, owners: list[int], captions: list[int], ks=KS) -> Retrieval:
    """One query and one candidate at a time; a wrong candidate as similar as the best right one is before it."""

    def recalls(queries: Tensor, candidates: Tensor, right: list[set[int]]) -> dict[int, float]:
        ranks = []
        for query, matches in zip(queries.tolist(), right, strict=True):
            similarities = [
                math.fsum(a * b for a, b in zip(query, other, strict=True)) for other in candidates.tolist()
            ]
            best = max((similarities[place] for place in matches), default=-math.inf)
            ranks.append(sum(s >= best for place, s in enumerate(similarities) if place not in matches))
        return {k: sum(rank < k for rank in ranks) / len(ranks) for k in ks}

    def chances(right: list[set[int]], candidates: int) -> dict[int, float]:
        """Share of the k-subsets of the candidates that hold a right one, each subset looked at."""
        found = {}
        for k in ks:
            subsets = list(itertools.combinations(range(candidates), min(k, candidates)))
            found[k] = sum(bool(matches & set(subset)) for matches in right for subset in subsets)
            found[k] /= len(subsets) * len(right)
        return found

    said = [
        {caption for caption, owner in zip(captions, owners, strict=True) if owner == i} for i in range(len(images))
    ]
    by_image = [{place for place, caption in enumerate(captions) if caption in mine} for mine in said]
    by_text = [{i for i, mine in enumerate(said) if caption in mine} for caption in captions]
    return Retrieval(
        recalls(images, texts, by_image),
        recalls(texts, images, by_text),
        chances(by_image, len(texts)),
        chances(by_text, len(images)),
    )


def assert_same(found: Retrieval, expected: Retrieval) -> None:
    assert found.image_to_text == pytest.approx(expected.image_to_text, abs=1e-12)
    assert found.text_to_image == pytest.approx(expected.text_to_image, abs=1e-12)
    assert found.chance_image_to_text == pytest.approx(expected.chance_image_to_text, abs=1e-6)
    assert found.chance_text_to_image == pytest.approx(expected.chance_text_to_image, abs=1e-6)


def embed(rows: int, seed: int, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1)


def labels(count: int, kinds: int, seed: int) -> list[int]:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


CASES = {
    "one caption an image": ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], 7),
    "several captions an image, in no order": ([4, 0, 2, 2, 1, 0, 3, 4, 4, 1], list(range(10)), 5),
    "equal captions over different images": ([0, 1, 2, 3, 4, 5, 6], [10, 11, 10, 12, 11, 10, 13], 7),
    "equal captions of one image": ([0, 0, 0, 1, 2, 2], [5, 5, 6, 7, 8, 8], 3),
    "several captions, shared and not": ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 3, 0, 4, 5], 4),
    "an image without a caption": ([0, 2, 2, 3], [0, 1, 2, 0], 4),
    "ids that are hashes": ([0, 1, 2, 3], [-(2**62), 7, 2**62, 7], 4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tile", [0, 15, 10_000])
def test_against_a_double_loop(case, seed, tile, monkeypatch):
    """Recall and chance, both ways, whole and one to three rows at a time, against loops."""
    monkeypatch.setattr(tiles, "TILE", tile)
    owners, captions, count = case
    images, texts = embed(count, seed), embed(len(owners), seed + 100)
    found = retrieval(images, texts, torch.tensor(owners), torch.tensor(captions), KS)
    assert_same(found, naive(images, texts, owners, captions))


@pytest.mark.parametrize("seed", range(3))
def test_many_pairs_at_once(seed):
    """60 captions of 25 images with 20 different texts, against loops."""
    images, texts = embed(25, seed, 6), embed(60, seed + 100, 6)
    owners, captions = labels(60, 25, seed), labels(60, 20, seed + 1)
    found = retrieval(images, texts, torch.tensor(owners), torch.tensor(captions), (1, 2))
    assert_same(found, naive(images, texts, owners, captions, (1, 2)))


@pytest.mark.parametrize("seed", range(4))
def test_ties_count_against(seed):
    """Embeddings on the axes, so that most similarities are exactly 0 or 1: against loops, where ties come first."""
    axes = torch.eye(3, dtype=torch.float64)
    owners, captions = [0, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 0, 4, 5]
    images, texts = axes[labels(6, 3, seed)], axes[labels(7, 3, seed + 9)]
    found = retrieval(images, texts, torch.tensor(owners), torch.tensor(captions), KS)
    assert_same(found, naive(images, texts, owners, captions))


@pytest.mark.parametrize("even", [False, True], ids=["any point", "equal coordinates"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "width"), [(11, 8), (16, 64), (37, 130), (257, 33), (1030, 16), (65, 512), (11, 768), (40, 1024)]
)
def test_a_collapsed_model_finds_nothing(count, width, dtype, even):
    """All images at one point and all captions at another, at sizes that matrix kernels round differently: all 0.

    Equal coordinates are the case in which the terms' rounding errors all point the same way.
    """
    points = (torch.full((1, width), width**-0.5) if even else embed(1, seed, width) for seed in range(2))
    images, texts = (point.to(dtype).repeat(count, 1) for point in points)
    found = retrieval(images, texts, torch.arange(count), torch.arange(count))
    assert found.image_to_text == found.text_to_image == {1: 0.0, 5: 0.0, 10: 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 64, 512, 1024])
@pytest.mark.parametrize(("units", "found"), [(-2.0, 0), (0.0, 0), (0.5, 0), (2.0, 1)])
def test_what_is_a_tie(width, units, found, dtype):
    """The right caption nearer than the other by so many times D · eps: within one it is a tie, beyond it is found."""
    step = units * width * torch.finfo(dtype).eps
    images, texts = torch.zeros(2, width, dtype=dtype), torch.zeros(2, width, dtype=dtype)
    images[0, 0] = images[1, 1] = 1
    # Similarities of both images to both captions: 0.5 to the other's, 0.5 + step to their own.
    texts[:, :2] = torch.tensor([[0.5 + step, 0.5], [0.5, 0.5 + step]], dtype=dtype)
    recall = retrieval(images, texts, torch.arange(2), torch.arange(2), (1,))
    assert recall.image_to_text[1] == recall.text_to_image[1] == found


@pytest.mark.parametrize("spoiled", ["images", "texts", "one image"])
def test_not_a_number_is_not_found(spoiled):
    """A query or a right candidate that is NaN counts as missed: a model that diverged does not score 100%."""
    images, texts = embed(12, 0), embed(12, 0)
    if spoiled == "images":
        images[:] = torch.nan
    elif spoiled == "texts":
        texts[:] = torch.nan
    else:
        images[3] = torch.nan
    found = retrieval(images, texts, torch.arange(12), torch.arange(12), (1,))
    most = 11 / 12 if spoiled == "one image" else 0.0
    assert found.image_to_text[1] == pytest.approx(most)
    # Whether a wrong candidate that is NaN stands before the right one is open; the right one that is NaN is missed.
    assert found.text_to_image[1] <= most + 1e-12


def test_perfect_model():
    """Each caption on its own image's place, equal captions at one place: all found."""
    images = embed(6, 0, 8)
    owners = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    found = retrieval(images, images[owners], owners, torch.tensor([0, 1, 2, 3, 4, 5, 0]))
    assert found.image_to_text == found.text_to_image == {1: 1.0, 5: 1.0, 10: 1.0}


def test_chance_is_what_random_orders_score():
    """Chance against the mean score over all 24 orders of four captions' embeddings: 1e-12.

    Each order is one way to hand distinct similarities to the candidates: what a model that knows nothing does.
    """
    owners, captions = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 2])
    images, texts = embed(3, 0), embed(4, 1)
    scores = [
        retrieval(images, texts[list(order)], owners, captions, (1, 2)) for order in itertools.permutations(range(4))
    ]
    for k in (1, 2):
        mean = sum(score.image_to_text[k] for score in scores) / len(scores)
        assert scores[0].chance_image_to_text[k] == pytest.approx(mean, abs=1e-12)
    turned = [
        retrieval(images[list(order)], texts, owners, captions, (1, 2)) for order in itertools.permutations(range(3))
    ]
    for k in (1, 2):
        mean = sum(score.text_to_image[k] for score in turned) / len(turned)
        assert scores[0].chance_text_to_image[k] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("seed", range(3))
def test_median_rank(case, seed):
    """The median over the queries of one more than the wrong candidates before the best right one, by sorted loops."""
    owners, captions, count = case
    images, texts = embed(count, seed), embed(len(owners), seed + 100)
    found = retrieval(images, texts, torch.tensor(owners), torch.tensor(captions), KS)
    said = [
        {caption for caption, owner in zip(captions, owners, strict=True) if owner == i} for i in range(len(images))
    ]
    of_images = [{place for place, caption in enumerate(captions) if caption in mine} for mine in said]
    of_texts = [{i for i, mine in enumerate(said) if caption in mine} for caption in captions]
    for way, queries, others, right in (("i→t", images, texts, of_images), ("t→i", texts, images, of_texts)):
        ranks = []
        for row, mine in zip((queries @ others.T).tolist(), right, strict=True):
            order = sorted(range(len(row)), key=lambda place: -row[place])
            wrong = [place for place in order if place not in mine]
            best = max((row[place] for place in mine), default=-math.inf)
            ranks.append(1 + sum(row[place] >= best for place in wrong))
        assert found.median_rank[way] == statistics.median(ranks)


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operations give."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += sum(one.numel() for one in tree_leaves(out) if isinstance(one, Tensor))
        return out


def test_twice_the_captions_take_twice_the_work():
    """Of four images: elements computed for 8,192 captions and for 16,384, not four times as many."""
    counts = []
    for number in (8192, 16_384):
        with Elements() as elements:
            retrieval(embed(4, 0), embed(number, 1), torch.arange(number) % 4, torch.arange(number))
        counts.append(elements.count)
    assert counts[1] < 2.2 * counts[0]


def test_more_places_than_candidates():
    """At k of the number of candidates and above, everything is found, by chance too."""
    images = embed(4, 0)
    found = retrieval(images, embed(4, 1), torch.arange(4), torch.arange(4), (4, 10))
    assert set(found.image_to_text.values()) == set(found.chance_text_to_image.values()) == {1.0}


def test_an_image_without_a_caption_counts_for_nothing():
    """The figures are those of the other images and their captions."""
    images = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    texts, captions = images[[0, 2, 3]], ["a", "c", "d"]

    def collection(images: Tensor, owners: list[int]) -> Collection:
        paths = [f"{place}.png" for place in range(len(images))]
        return Collection(paths, images, captions, texts, owners, torch.arange(3), [], [], [], lambda _: texts, [])

    found = module.score_captions(collection(images, [0, 2, 3]))
    assert found == module.score_captions(collection(images[[0, 2, 3]], [0, 1, 2]))
    assert found.text_to_image[1] == 1
