"""The order of the data: one sequence of global batches, whatever the number of processes and wherever it begins."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from train_clip.data.pairs import PairList
from train_clip.data.samples import GlobalBatchSampler

N, G = 22, 4  # pairs, and pairs of a global batch: 5 batches an epoch, 2 pairs left over
BATCHES = N // G

Key = tuple[int, int]


class Position:
    """The count of global batches that a run has trained on."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def __call__(self) -> int:
        return self.count


def sampler(consumed: Callable[[], int | None], rank: int = 0, size: int = 1, seed: int = 5, shuffle: bool = True):
    return GlobalBatchSampler(PairList("", map(str, range(N)), [""] * N), G, consumed, shuffle, seed, (rank, size))  # type: ignore[arg-type]


def run(size: int, start: int = 0, epochs: int = 3, seed: int = 5, limit: int = BATCHES) -> list[list[Key]]:
    """The global batches that processes train on, from a position to the end of the run, ranks side by side.

    As a Trainer does it: its epochs have ``limit`` batches each, and it stops an iteration by its own count.
    """
    positions = [Position(start) for _ in range(size)]
    samplers = [sampler(position, rank, size, seed) for rank, position in enumerate(positions)]
    share = G // size
    batches: list[list[Key]] = []
    while positions[0].count < epochs * BATCHES:
        number = min(limit - positions[0].count % limit, epochs * BATCHES - positions[0].count)
        parts = [list(islice(each, number * share)) for each in samplers]
        assert all(len(part) == number * share for part in parts)
        for first in range(0, number * share, share):
            batches.append([key for part in parts for key in part[first : first + share]])
        for position in positions:
            position.count += number
    return batches


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_epoch_is_a_permutation_without_its_remainder(size: int) -> None:
    """All ranks together: 20 different pairs of 22 an epoch, each key with its epoch; others left over in others."""
    batches = run(size, epochs=12)
    assert len(batches) == 12 * BATCHES
    left_over = []
    for epoch in range(12):
        keys = [key for batch in batches[epoch * BATCHES : (epoch + 1) * BATCHES] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        indices = [key[1] for key in keys]
        assert len(indices) == len(set(indices)) == BATCHES * G
        assert set(indices) < set(range(N))
        left_over.append(frozenset(range(N)) - frozenset(indices))
    assert len(set(left_over)) > 6


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_processes_changes_nothing(size: int) -> None:
    """The same global batches, in the same order within, as one process has."""
    assert run(size) == run(1)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1), (4, 1), (1, 4)])
def test_resuming_anywhere_gives_the_uninterrupted_sequence(before: int, after: int) -> None:
    """Stopped after any count of batches of three epochs, edges included, and gone on with another number of ranks."""
    whole = run(1)
    assert len(whole) == 3 * BATCHES
    for consumed in range(3 * BATCHES + 1):
        assert run(before)[:consumed] + run(after, consumed) == whole


@pytest.mark.parametrize("size", [1, 2])
def test_a_trainer_that_ends_its_epochs_early_leaves_nothing_out(size: int) -> None:
    """Epochs of 1 to 4 batches of 5 (``limit_train_batches``), begun anywhere: the sequence of whole epochs."""
    whole = run(1)
    for limit in range(1, BATCHES):
        for start in range(0, 3 * BATCHES, 2):
            assert run(size, start, limit=limit) == whole[start:], (limit, start)


def test_epochs_and_seeds_differ() -> None:
    """Six epochs of three seeds are 18 different orders; the same seed gives the same order."""
    orders = []
    for seed in range(3):
        batches = run(1, epochs=6, seed=seed)
        assert batches == run(1, epochs=6, seed=seed)
        orders += [
            tuple(index for batch in batches[epoch * BATCHES : (epoch + 1) * BATCHES] for _, index in batch)
            for epoch in range(6)
        ]
    assert len(set(orders)) == 18


def test_every_pair_comes_first_as_often() -> None:
    """Over 2,200 epochs each of 22 pairs opens the epoch 100 times, within 5 deviations: no place is preferred."""
    position = Position()
    own = sampler(position)
    counts = [0] * N
    for epoch in range(100 * N):
        position.count = epoch * BATCHES
        counts[next(iter(own))[1]] += 1
    assert all(abs(count - 100) < 50 for count in counts)


def test_without_shuffling_the_order_is_the_datas() -> None:
    """0, 1, 2, … in every epoch; two ranks take halves of each four."""
    position = Position(BATCHES)
    assert list(sampler(position, shuffle=False)) == [(1, index) for index in range(20)]
    halves = [list(sampler(position, rank, 2, shuffle=False)) for rank in range(2)]
    assert halves[0][:4] == [(1, 0), (1, 1), (1, 4), (1, 5)]
    assert halves[1][:4] == [(1, 2), (1, 3), (1, 6), (1, 7)]


def test_set_epoch_is_not_heard() -> None:
    """Lightning's call, before and within an epoch, changes nothing: the count alone decides (RELIABILITY 2)."""
    expected = list(sampler(Position(3)))
    own = sampler(Position(3))
    own.set_epoch(9)
    iterator = iter(own)
    found = [next(iterator)]
    own.set_epoch(4)
    assert [*found, *iterator] == expected
    assert list(own) == expected


@pytest.mark.parametrize("size", [1, 2])
def test_where_nobody_counts_each_iteration_is_an_epoch(size: int) -> None:
    """Three iterations, against the same sampler with a count; then one that ``set_epoch`` chooses, and the next."""
    for rank in range(size):
        own = sampler(lambda: None, rank, size)
        expected = [list(sampler(Position(epoch * BATCHES), rank, size)) for epoch in range(5)]
        assert [list(own) for _ in range(3)] == expected[:3]
        own.set_epoch(1)
        assert [list(own), list(own)] == expected[1:3]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_length_is_always_a_whole_epochs(size: int) -> None:
    """20 keys over all ranks, wherever the next iteration begins: Lightning counts an epoch's batches by it."""
    position = Position()
    own = sampler(position, 0, size)
    for position.count in range(2 * BATCHES + 2):
        assert len(own) == BATCHES * G // size
        assert own.batches_per_epoch == BATCHES


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_iteration_runs_on_over_the_epochs_end(size: int) -> None:
    """Begun after any count: 5 global batches, those that whole epochs have there, the next epoch's with its number."""
    whole = run(1, epochs=4)
    for start in range(2 * BATCHES + 2):
        parts = [list(sampler(Position(start), rank, size)) for rank in range(size)]
        assert [len(part) for part in parts] == [BATCHES * G // size] * size
        for number in range(BATCHES):
            places = slice(number * G // size, (number + 1) * G // size)
            assert [key for part in parts for key in part[places]] == whole[start + number]
            assert all(key[0] == (start + number) // BATCHES for part in parts for key in part[places])


def test_an_iteration_that_has_begun_keeps_its_position() -> None:
    """The count at the moment of ``iter()`` decides, not at the first key, nor where another iteration stands."""
    position = Position(3)
    own = sampler(position)
    expected = list(own)
    first = iter(own)
    position.count = 7
    second = iter(own)
    alternating = [(next(first), next(second)) for _ in range(BATCHES * G)]
    assert [key for key, _ in alternating] == expected
    assert [key for _, key in alternating] == list(sampler(Position(7)))


def as_list(keys: list[Key]) -> list[Key]:
    """Leave a loader's keys as they are."""
    return keys


class Keys:
    """A data set that gives back what it is asked for."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, key: Key) -> Key:
        return key


@pytest.mark.parametrize("limit", [BATCHES, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_position_is_read_when_an_epoch_begins(workers: int, limit: int) -> None:
    """One loader over a Trainer's epochs of 5 or 3 batches, begun within the first, prefetching past their ends."""
    position = Position(2)
    own = sampler(position)
    loader = DataLoader(
        Keys(),  # type: ignore[arg-type]
        sampler=own,
        batch_size=G,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
        collate_fn=as_list,
    )
    batches = []
    for number in (limit - 2, limit, limit, limit):
        for batch in islice(loader, number):
            batches.append(batch)
            position.count += 1
    assert batches == run(1, 2, epochs=4)[: 4 * limit - 2]
