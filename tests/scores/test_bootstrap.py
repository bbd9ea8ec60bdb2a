"""Intervals of figures: against one resample at a time in NumPy, and whether they hold the truth as often as said.

N  images      M  captions      C  classes      R  resamples
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch.nn import functional as F

from train_clip.evaluation.retrieval import retrieval
from train_clip.evaluation.zero_shot import zero_shot
from train_clip.scores import bootstrap


def embed(rows: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def draws(number: int) -> list[np.ndarray]:
    """The images of each resample, with those that are drawn twice, from the same seed."""
    generator = np.random.default_rng(bootstrap.SEED)
    return [generator.integers(number, size=number) for _ in range(bootstrap.RESAMPLES)]


def bounds_of(values: list[float], number: int) -> list[float]:
    """Percentiles; where all resamples of so many images are 0 or 1, Clopper and Pearson's interval by SciPy."""
    if {*values} in ({0.0}, {1.0}):
        exact = binomtest(int(number * values[0]), number).proportion_ci(0.95, "exact")
        return [exact.low, exact.high]
    return np.percentile(values, [2.5, 97.5]).tolist()


@pytest.mark.parametrize("held", [1, 300, 2**22])
def test_retrieval_against_a_loop(held, monkeypatch):
    """Each image is drawn with all its captions, written out one after the other: bounds of both ways, 1e-12.

    One resample at a time, a few, and all.
    """
    monkeypatch.setattr(bootstrap, "HELD", held)
    owners = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 6, 7, 8, 8, 9, 9])
    images = embed(10, 0)
    texts = F.normalize(images[owners] + 0.9 * embed(len(owners), 1), dim=-1)
    found = retrieval(images, texts, owners, torch.arange(len(owners)), (1, 3))
    similarity, of = (images @ texts.T).numpy(), owners.numpy()
    ranks: dict[str, list[list[int]]] = {"i→t": [], "t→i": []}
    for i in range(10):
        # An image's own other captions are right too.
        best = similarity[i, of == i].max()
        ranks["i→t"].append([1 + int((similarity[i, of != i] > best).sum())])
        ranks["t→i"].append([1 + int((similarity[:, j] > similarity[i, j]).sum()) for j in np.flatnonzero(of == i)])
    bounds = bootstrap.with_intervals(found).intervals
    assert len(bounds) == 6
    for way, of_image in ranks.items():
        values: dict[str, list[float]] = {}
        for drawn in draws(10):
            written_out = np.array([rank for image in drawn for rank in of_image[image]])
            values.setdefault(f"median rank {way}", []).append(float(np.median(written_out)))
            for k in (1, 3):
                values.setdefault(f"R@{k} {way}", []).append(float(np.mean(written_out <= k)))
        for name, several in values.items():
            assert bounds[name] == pytest.approx(bounds_of(several, 10), abs=1e-12), name


def test_classification_against_a_loop():
    """Top-1, top-5 and the mean over the classes that a resample has."""
    classes, labels = embed(7, 0), torch.randint(6, (30,), generator=torch.Generator().manual_seed(1))
    images = F.normalize(classes[labels] + embed(30, 2), dim=-1)
    bounds = bootstrap.with_intervals(zero_shot(images, labels, classes)).intervals
    before = [int((row > row[label]).sum()) for row, label in zip(images @ classes.T, labels, strict=True)]
    values: dict[str, list[float]] = {"zero-shot top-1": [], "zero-shot top-5": [], "zero-shot mean per class": []}
    for drawn in draws(30):
        hits, own = np.array(before)[drawn] < 1, labels.numpy()[drawn]
        values["zero-shot top-1"].append(hits.mean())
        values["zero-shot top-5"].append((np.array(before)[drawn] < 5).mean())
        values["zero-shot mean per class"].append(np.mean([hits[own == place].mean() for place in set(own)]))
    for name, several in values.items():
        assert bounds[name] == pytest.approx(bounds_of(several, 30), abs=1e-12), name


def test_of_all_images_once_it_is_the_figure_itself():
    """A resample that has each image once: recalls, medians and accuracies as they were scored."""
    images, texts, owners = embed(20, 0), embed(40, 1), torch.arange(40) % 20
    found = retrieval(images, texts, owners, torch.arange(40))
    once = bootstrap.resampled(found, torch.ones(1, 20, dtype=torch.float64))
    medians = {f"median rank {way}": median for way, median in found.median_rank.items()}
    assert {name: one.item() for name, one in once.items()} == pytest.approx(found.figures() | medians)


@pytest.mark.parametrize("values", [[3, 1, 2], [5, 5, 1, 9], [4]])
def test_median_of_repeated_values(values):
    """Against NumPy on the values written out, of an even number too; of nothing it is NaN."""
    weights = torch.tensor([[place % 3 for place in range(len(values))], [2] * len(values), [0] * len(values)]).double()
    found = bootstrap.median(torch.tensor(values), weights)
    for row, one in zip(weights.long().tolist(), found.tolist(), strict=True):
        written_out = np.repeat(values, row)
        assert (one != one) if not len(written_out) else one == np.median(written_out)


def test_coverage(monkeypatch):
    """Of 300 sets of images whose captions hang together: the 95% interval holds the truth in 91 to 98 of 100.

    One over pairs, which takes captions for independent, holds it in less than 80.
    """
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    rng, truth, captions = np.random.default_rng(1), 0.5, 8
    held = {"images": 0, "pairs": 0}
    for _ in range(300):
        share = rng.beta(0.5, 0.5, size=60)  # of an image's captions that find it
        hits = rng.random((60, captions)) < share[:, None]
        ranks = torch.tensor(np.where(hits, 1, 9)).flatten()
        owners = torch.arange(60).repeat_interleave(captions)
        found = retrieval(embed(60, 0), embed(60 * captions, 1), owners, torch.arange(60 * captions), (1,))
        for which, of_query, number in (("images", owners, 60), ("pairs", torch.arange(60 * captions), 60 * captions)):
            queries = found.queries[0], found.queries[1]._replace(ranks=ranks, images=of_query)
            low, high = bootstrap.with_intervals(replace(found, queries=queries, num_images=number)).intervals[
                "R@1 t→i"
            ]
            held[which] += low <= truth <= high
    assert 273 <= held["images"] <= 294
    assert held["pairs"] < 240


def test_the_same_images_are_drawn_whatever_hangs_on_them():
    """Two models with other numbers of captions: their resamples are of the same images, so that they are paired."""
    few, many = (
        retrieval(embed(12, 0), embed(number, 1), torch.arange(number) % 12, torch.arange(number), (1,))
        for number in (12, 36)
    )
    members = torch.arange(12)
    first, second = (bootstrap.replicates(found, members)["R@1 i→t"] for found in (few, many))
    hits = [(found.queries[0].ranks <= 1).numpy() for found in (few, many)]
    for place, drawn in enumerate(draws(12)[:50]):
        assert first[place] == pytest.approx(hits[0][drawn].mean())
        assert second[place] == pytest.approx(hits[1][drawn].mean())


@pytest.mark.parametrize("hit", [True, False])
@pytest.mark.parametrize("number", [1, 2, 11, 100])
def test_where_all_images_are_alike(hit, number):
    """All found or none: Clopper and Pearson's exact interval, by SciPy; of ranks none below six images."""
    places = torch.arange(number)
    found = retrieval(embed(number, 0), embed(number, 0), places, places, (1,))
    if not hit:
        found = replace(found, queries=[one._replace(ranks=one.ranks + 1) for one in found.queries])
    bounds = bootstrap.with_intervals(found).intervals
    exact = binomtest(number * hit, number).proportion_ci(0.95, "exact")
    assert bounds["R@1 i→t"] == pytest.approx([exact.low, exact.high])
    assert ("median rank i→t" in bounds) == (number >= 6)


def test_images_without_captions_do_not_make_an_interval_narrower():
    """Two images with captions among 100: as of the two."""
    places = torch.arange(2)
    found = retrieval(embed(2, 0), embed(2, 0), places, places, (1,))
    bounds = bootstrap.with_intervals(replace(found, num_images=100)).intervals
    assert bounds["R@1 i→t"] == pytest.approx([0.025**0.5, 1])


@pytest.mark.parametrize("held", [1, 30, 2**22])
def test_ratios_against_a_loop(held, monkeypatch):
    """Sums over the images of each resample, written out: 1e-12; no value where there is nothing to divide by."""
    monkeypatch.setattr(bootstrap, "HELD", held)
    rng = np.random.default_rng(3)
    parts, wholes = rng.integers(0, 4, (9, 2)).astype(float), rng.integers(1, 5, (9, 2)).astype(float)
    found = bootstrap.ratios(torch.from_numpy(parts), torch.from_numpy(wholes))
    expected = [parts[drawn].sum(axis=0) / wholes[drawn].sum(axis=0) for drawn in draws(9)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    nothing = torch.zeros(3, 1, dtype=torch.float64)
    assert bootstrap.ratios(nothing, nothing).isnan().all()
