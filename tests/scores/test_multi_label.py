"""Average precision against scikit-learn, and its chance against every order that there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from train_clip.scores import bootstrap
from train_clip.scores.multi_label import FIGURE, average_precision, chance, multi_label

N, C, D = 40, 6, 8


@pytest.fixture(params=range(3))
def scored(request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with none, one or several of the classes; all have the last class, none has the one before it."""
    generator = torch.Generator().manual_seed(request.param)
    right = torch.rand(N, C, generator=generator) < 0.3
    right[:, -1], right[:, -2] = True, False
    classes = F.normalize(torch.randn(C, D, generator=generator), dim=-1)
    images = F.normalize(right.float() @ classes + torch.randn(N, D, generator=generator), dim=-1)
    images[5:9] = images[4]  # equal scores
    return images, right, classes


def test_against_scikit_learn(scored):
    """Of each class and their mean: 1e-6; a class that all images have, or none, is left out."""
    images, right, classes = scored
    found = multi_label(images, right, classes, list("abcdef"))
    similarity = (images @ classes.T).numpy()
    expected = [average_precision_score(right[:, place], similarity[:, place]) for place in range(C - 2)]
    assert list(found.per_class) == list("abcd")
    assert list(found.per_class.values()) == pytest.approx(expected, abs=1e-6)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-6)


def test_its_interval_against_scikit_learn(scored, monkeypatch):
    """The mean of 60 resamples, each image as often as it is drawn."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 60)
    images, right, classes = scored
    found = multi_label(images, right, classes, list("abcdef"))
    values = bootstrap.replicates(found, torch.arange(N))[FIGURE]
    similarity, generator = (images @ classes.T).numpy(), np.random.default_rng(bootstrap.SEED)
    for value in values.tolist():
        drawn = generator.integers(N, size=N)
        precisions = [
            average_precision_score(right[drawn, place], similarity[drawn, place])
            for place in range(C - 2)
            if right[drawn, place].any()
        ]
        assert value == pytest.approx(np.mean(precisions), abs=1e-6)
    low, high = bootstrap.with_intervals(found).intervals[FIGURE]
    assert low < found.mean < high


@pytest.mark.parametrize("hits", range(1, 5))
def test_chance_is_what_random_orders_score(hits):
    """Against the mean over all orders of five images: 1e-12."""
    once, mine = torch.ones(1, 5, dtype=torch.float64), torch.arange(5) < hits
    orders = [torch.tensor(order).double() for order in itertools.permutations(range(5))]
    mean = np.mean([average_precision(order, mine, once).item() for order in orders])
    assert chance(torch.tensor([hits]).double(), 5).item() == pytest.approx(mean, abs=1e-12)


def test_classes_that_tell_no_images_apart():
    """All images have the first class and none the other: no figure, rather than one that is not a number."""
    images, classes = F.normalize(torch.randn(2, N, D), dim=-1)[:, :2]
    found = bootstrap.with_intervals(multi_label(images, torch.tensor([[True, False]] * 2), classes, ["a", "b"]))
    assert (found.mean, found.chance, found.per_class, found.intervals, found.figures()) == (None, None, {}, {}, {})
    assert found.rows() == "multi-label: not scored, since each class is in all of the images or in none"
