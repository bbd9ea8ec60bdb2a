"""Training on shards: each pair once an epoch on any number of processes and workers, and on from within an epoch."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from test_resume_processes import BATCH, fit
from two_processes import run

from tests.conftest import write_pairs
from train_clip.shards import members
from train_clip.shards.write import ShardOptions, data_shards

PAIRS = 20  # 5 batches of 4 an epoch, none left over


def runs_of(folder: Path, resumed: Path, names: list[str]) -> dict[str, list]:
    """A run of each number of workers, and what is left of an epoch that ``resumed`` has begun."""
    shards = {"shards": str(folder / "shards")}
    whole = {name: fit(folder, name, workers=int(name[-1]), **shards)["batches"] for name in names}
    return whole | {"rest": fit(folder, f"{names[0]}-rest", resumed, **shards)["batches"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        data_shards(
            write_pairs(folder / "data", PAIRS),
            options=ShardOptions(output=folder / "shards", pairs_per_shard=3, num_workers=0),
        )
        shutil.rmtree(folder / "data")
        members.index_of.cache_clear()
        found = {"one": fit(folder, "one-0", shards=str(folder / "shards"))["batches"]}
        state = "step-00000003.ckpt"
        for number in (2, 4):
            (folder / f"of {number}").mkdir()
            each = partial(runs_of, folder, folder / "one-0" / state, [f"{number}-0", f"{number}-2"])
            found[number] = run(each, folder / f"of {number}", number)[0]
        found["back"] = fit(folder, "back", folder / "2-0" / state, shards=str(folder / "shards"))["batches"]
        found["workers"] = fit(folder, "one-2", workers=2, shards=str(folder / "shards"))["batches"]
    return found


def test_each_pair_once_an_epoch(runs):
    """By digests of captions, which are each pair's own two lines: 20 different pixels in each of two epochs."""
    for epoch in (runs["one"][:5], runs["one"][5:]):
        assert len({pixels for batch in epoch for pixels, _ in batch}) == PAIRS and len(epoch) == PAIRS // BATCH


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_and_workers_sees_the_same(number, workers, runs):
    """Batches in order, against one process without workers."""
    assert runs[number][f"{number}-{workers}"] == runs["one"] == runs["workers"]


def test_a_run_goes_on_within_an_epoch_on_other_processes(runs):
    """1 → 2, 1 → 4 and 2 → 1 after three of five batches: the rest, against the uninterrupted run."""
    assert runs[2]["rest"] == runs[4]["rest"] == runs["back"] == runs["one"][3:]
