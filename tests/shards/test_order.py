"""The order of pairs in shards: a function of (seed, epoch), each as often as its weight says, windows of shards."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_clip.data.samples import GlobalBatchSampler
from train_clip.shards.pairs import WINDOW, ShardPairs


def pairs_of(sizes: list[list[int]], weights: list[float]) -> ShardPairs:
    """Sources of shards of so many pairs."""
    rows = [
        (f"{source}-{shard}.tar!{row}.jpg", f"{source}-{shard}.tar!{row}.txt", source)
        for source, shards in enumerate(sizes)
        for shard, number in enumerate(shards)
        for row in range(number)
    ]
    return ShardPairs("", *zip(*rows, strict=True), weights)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=3), st.integers(0, 5))
def test_without_weights_an_epoch_has_each_pair_once(sizes, epoch):
    pairs = pairs_of(sizes, [1.0] * len(sizes))
    assert sorted(pairs.order(3, epoch).tolist()) == list(range(len(pairs))), "against a range"
    assert pairs.order(3, epoch).tolist() == pairs.order(3, epoch).tolist()


def test_weights_are_kept_in_the_long_run_and_as_evenly_as_can_be():
    """Over ten epochs, against counting: weights 2.5, 1 and 0.3 of 20, 7 and 10 pairs."""
    pairs = pairs_of([[10, 10], [7], [4, 6]], [2.5, 1.0, 0.3])
    assert pairs.per_epoch == 50 + 7 + 3
    counts = Counter(place for epoch in range(10) for place in pairs.order(0, epoch).tolist())
    assert [counts[place] for place in range(37)] == [25] * 20 + [10] * 7 + [3] * 10


def test_a_window_of_shards_is_read_before_the_next():
    """Of 40 shards of 5 pairs, none of the 17th is read before all of the first 16, and pairs within are mixed."""
    order = pairs_of([[5] * 40], [1.0]).order(1, 2) // 5
    windows = [set(order[start : start + 5 * WINDOW].tolist()) for start in range(0, 200, 5 * WINDOW)]
    assert [len(one) for one in windows] == [16, 16, 8] and len(set.union(*windows)) == 40
    assert len(set(order[:16].tolist())) > 5, "pairs of many shards are mixed"
    assert order.tolist() != (pairs_of([[5] * 40], [1.0]).order(1, 3) // 5).tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_pair_once_on_any_number_of_processes(size):
    """All slices of an epoch together, against the order; a start within it goes on there, on any number."""
    pairs = pairs_of([[6] * 8], [1.0])

    def batches(position: int, size: int) -> list[list[int]]:
        parts = [
            [index for _, index in GlobalBatchSampler(pairs, 8, lambda: position, True, 5, (rank, size))]
            for rank in range(size)
        ]
        share = 8 // size
        starts = range(0, len(parts[0]), share)
        return [sorted(index for part in parts for index in part[start : start + share]) for start in starts]

    assert sorted(index for batch in batches(0, size) for index in batch) == list(range(48))
    assert batches(2, size)[:4] == batches(0, 1)[2:]


def test_taking_some_keeps_sources_and_shards():
    pairs = pairs_of([[3, 3], [4]], [1.0, 2.0]).take([0, 4, 7, 9])
    assert [pair.image for pair in pairs] == ["0-0.tar!0.jpg", "0-1.tar!1.jpg", "1-0.tar!1.jpg", "1-0.tar!3.jpg"]
    assert pairs.per_epoch == 2 + 4 and pairs.sources.tolist() == [0, 0, 1, 1]
    assert len(np.unique(pairs.shards)) == 3


def test_a_small_weight_is_at_least_one_pair_an_epoch():
    pairs = pairs_of([[2], [50]], [0.1, 1.0])
    seen = Counter(place for epoch in range(20) for place in pairs.order(0, epoch).tolist())
    assert (seen[0], seen[1]) == (10, 10)
