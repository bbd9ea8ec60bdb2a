"""SIGKILL at any moment, in the middle of a save too, against the same run left alone."""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from command import (
    Command,
    Result,
    callback,
    consumed,
    differences,
    last,
    leftovers,
    require_same_state,
    run,
    write_inputs,
)

from train_clip.checkpoints.own import read_checkpoint

PAIRS, BATCHES = 48, 10  # 5 of the pairs are held out; batches of 4 to one epoch
INTERVAL = 4  # optimizer steps between saves
MOMENTS = ("save", "batch", "start")
PAUSE = 0.02  # seconds a batch, lest the run be over before it is killed


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """What all runs have in common."""
    return [*write_inputs(tmp_path_factory.mktemp("inputs"), PAIRS), "--val_share", "0.1"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Callable[[int], Path]:
    """The run of so many epochs that was left alone."""

    @cache
    def train(epochs: int) -> Path:
        folder = tmp_path_factory.mktemp("alone") / "run"
        run([*words, "--epochs", str(epochs), "--output", str(folder)]).require(0)
        return folder

    return train


@pytest.mark.parametrize(("kills", "epochs"), [(3, 4), pytest.param(50, 50, marks=pytest.mark.slow)])
def test_a_killed_run_loses_no_more_than_the_interval(kills, epochs, words, alone, tmp_path):
    """After each kill all checkpoints load, and no more steps are lost than lie between saves; in the end nothing is.

    As soon as a save has begun, some time after a batch, while the run starts; further moments are random, by a seed.
    """
    folder, record = tmp_path / "run", tmp_path / "record"
    start = [*words, "--epochs", str(epochs), "--save_every", str(INTERVAL)]
    start += callback("Record", file=str(record), pause=PAUSE)
    rng = random.Random(0)
    within_a_save = []
    for number in range(kills):
        process = Command([*start, "--output", str(folder)])
        kill_at(MOMENTS[number] if number < 3 else rng.choice(MOMENTS), process, folder, record, rng)
        within_a_save += leftovers(folder, process.process.pid)
        newest = max((read_checkpoint(file) for file in (folder / "checkpoints").glob("*.ckpt")), key=consumed)
        assert steps(record)[-1] - consumed(newest) <= INTERVAL
        assert newest["global_step"] == consumed(newest)
        start = ["train", "--resume", "auto"]
    print(f"{len(within_a_save)} of {kills} kills within a save: {', '.join(within_a_save)}")
    assert within_a_save

    result = run([*start, "--output", str(folder)]).require(0)
    assert f"after {consumed(newest):,} steps and {consumed(newest):,} batches." in result.text
    assert leftovers(folder) == []
    require_same_run(folder, alone(epochs), BATCHES * epochs)


def test_a_kill_before_the_best_state_is_named_loses_no_best_state(words, alone, tmp_path):
    """Killed within a save, when the state of the best validation is safe, but has not got its second name."""
    killed_in_save(words, tmp_path / "run", BATCHES, "best.ckpt").require(-9)
    run(["train", "--resume", str(tmp_path / "run"), "--callbacks", "null"]).require(0)
    require_same_run(tmp_path / "run", alone(2), BATCHES * 2)


def test_kills_while_the_running_mean_is_saved_lose_none(words, tmp_path):
    """Killed while the mean is written, before it is named the best, and before the state that knows of it is written.

    In the end the newest and the best mean are those of the run that was left alone.
    """
    folder, words = tmp_path / "run", [*words, "--ema", "0.5"]
    killed_in_save(words, folder, None, "ema/last.ckpt", change=6).require(-9)
    again = ["train", "--resume", str(folder)]
    for step, path in ((None, "ema/best.ckpt"), (BATCHES, "checkpoints/best.ckpt")):
        run([*again, *callback("KillAtChange", step=step, path=path, change=1)]).require(-9)
        assert all(read_checkpoint(file) for file in (folder / "ema").glob("*.ckpt"))
    run([*again, "--callbacks", "null"]).require(0)
    run([*words, "--epochs", "2", "--output", str(tmp_path / "alone")]).require(0)
    require_same_run(folder, tmp_path / "alone", BATCHES * 2)
    for mean in ("last.ckpt", "best.ckpt"):
        one, other = (read_checkpoint(tmp_path / which / "ema" / mean) for which in ("run", "alone"))
        assert differences(one, other) == []


def test_kills_around_the_log_lose_no_row(words, alone, tmp_path):
    """Killed as soon as a state is safe, which has the row of its last step; then again while the log is taken over."""
    folder = tmp_path / "run"
    killed_in_save(words, folder, INTERVAL, f"step-{INTERVAL:08}.ckpt").require(-9)
    again = ["train", "--resume", str(folder)]
    run([*again, *callback("KillAtChange", path="metrics.csv", step=None, change=2)]).require(-9)
    run([*again, "--callbacks", "null"]).require(0)
    require_same_run(folder, alone(2), BATCHES * 2)


@pytest.mark.slow
@pytest.mark.parametrize("step", [BATCHES, 2 * INTERVAL])
def test_a_kill_before_any_change_to_a_file_within_a_save(step, words, alone, tmp_path):
    """A save, at an epoch's end or within it: killed before its first change to a file, its second, and so on."""
    changes = 0
    while killed_in_save(words, folder := tmp_path / f"run-{changes}", step, str(folder), changes + 1).code == -9:
        changes += 1
        run(["train", "--resume", str(folder), "--callbacks", "null"]).require(0)
        require_same_run(folder, alone(2), BATCHES * 2)
    # Open and rename; link and rename for each further name.
    assert changes >= 4


def kill_at(moment: str, process: Command, folder: Path, record: Path, rng: random.Random) -> None:
    """Wait for a moment, send SIGKILL, and see to it that this is what ended the process."""
    if moment == "start":
        time.sleep(rng.uniform(0, 1))
    else:
        before, batches = len(steps(record)), rng.randint(1, 2 * INTERVAL)
        process.wait_for(lambda: len(steps(record)) >= before + batches, f"{batches} batches")
        if moment == "save":
            # What is killed before its first checkpoint cannot go on.
            process.wait_for((folder / "checkpoints" / "last.ckpt").exists, "a checkpoint")
            process.wait_for(lambda: leftovers(folder), "a save")
        else:
            time.sleep(rng.uniform(0, 2 * PAUSE))
    process.kill()
    process.end().require(-9)


def killed_in_save(words: list[str], folder: Path, step: int | None, path: str, change: int = 1) -> Result:
    """Two epochs, killed in the save after that step, before one of the changes to paths of that name."""
    kill = callback("KillAtChange", step=step, path=path, change=change)
    return run([*words, "--epochs", "2", "--save_every", str(INTERVAL), "--output", str(folder), *kill])


def steps(record: Path) -> list[int]:
    """The number of optimizer steps after each batch that was ever done."""
    file = record.with_name(record.name + ".0")
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def require_same_run(folder: Path, reference: Path, num_steps: int) -> None:
    """The last state and the best one agree bit for bit, and so do the logged losses, a row a step."""
    require_same_state(last(folder), last(reference))
    require_same_state(*(read_checkpoint(one / "checkpoints" / "best.ckpt") for one in (folder, reference)))
    logged = losses(folder)
    assert [step for step, _ in logged] == list(range(num_steps))
    assert logged == losses(reference)


def losses(folder: Path) -> list[tuple[int, str]]:
    """Step and loss of each row of the log that has one, as written."""
    with (folder / "logs" / "metrics.csv").open() as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
