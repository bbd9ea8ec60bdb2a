"""SIGTERM and Ctrl-C at exact moments of a batch, against the same run left alone; and under torchrun."""

from __future__ import annotations

import csv
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from command import Command, Result, callback, consumed, last, leftovers, require_same_state, run, write_inputs

from train_clip.checkpoints.own import read_checkpoint

PAIRS, EPOCHS, BATCHES = 40, 2, 10  # batches of 4 to one epoch
STOP = 3  # the batch in which the signal comes, from 1
TERM, INT, HUP = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGHUP)

slow = pytest.mark.slow
MOMENTS = ("forward", "backward", "update")
# Processes, moment, the rank that gets the signal, the signal.
FAST = [
    *((1, moment, 0, TERM) for moment in MOMENTS),
    (1, "backward", 0, INT),
    (1, "update", 0, HUP),
    (2, "forward", 1, TERM),
    (2, "backward", 0, TERM),
    (2, "update", 1, TERM),
]
SLOW = [
    (2, "forward", 1, HUP),
    (2, "forward", 0, TERM),
    (2, "backward", 1, TERM),
    (2, "update", 0, TERM),
    (2, "backward", 1, INT),
]
RESUMED = [(1, "update", 0, TERM), (2, "forward", 1, TERM)]


@dataclass
class Stopped:
    """A run that a signal has ended.

    Args:
        folder: the run's.
        result: what the command ended with.
        codes: exit codes of its processes, by rank, as each saw its own.
    """

    folder: Path
    result: Result
    codes: dict[int, str]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """What all runs have in common."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"), PAIRS)
    return [*inputs, "--val_share", "0", "--epochs", str(EPOCHS), "--warmup_steps", str(BATCHES)]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Callable[[int], Path]:
    """The run on so many processes that was left alone, with its state after batch ``STOP`` kept."""

    @cache
    def train(devices: int) -> Path:
        folder = tmp_path_factory.mktemp("alone") / "run"
        how = ["--devices", str(devices), "--save_every", str(STOP), "--keep", "99", "--output", str(folder)]
        run([*words, *how], processes=devices).require(0)
        return folder

    return train


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory) -> Callable[[int, str, int, int], Stopped]:
    """The run that got a signal."""

    @cache
    def train(devices: int, moment: str, rank: int, number: int) -> Stopped:
        folder, codes = tmp_path_factory.mktemp("stopped") / "run", tmp_path_factory.mktemp("codes")
        when = callback("SignalAt", number=number, batch=STOP, moment=moment, rank=rank)
        how = ["--devices", str(devices), "--output", str(folder), *when]
        # Lightning starts the second process in one case, a test in the others.
        processes = 1 if moment == "forward" else devices
        result = run([*words, *how], ("-m", "moments"), processes, EXIT_CODES=str(codes))
        assert result.text.count(f"Signal {number} in {moment} on rank {rank}.") == 1
        return Stopped(folder, result, {int(file.name): file.read_text() for file in codes.iterdir()})

    return train


def with_slow(fast: list, rest: list) -> list:
    """Parameters of a test, the rest of them marked as slow."""
    return [*fast, *(pytest.param(*case, marks=slow) for case in rest if case not in fast)]


@pytest.mark.parametrize(("devices", "moment", "rank", "number"), with_slow(FAST, SLOW))
def test_a_signal_ends_the_batch_saves_and_ends_the_run(devices, moment, rank, number, stopped, alone):
    """The exit code on every process is the signal's, no process is left, and what is saved is that batch's state."""
    case = stopped(devices, moment, rank, number)
    case.result.require(128 + number)
    assert case.codes == dict.fromkeys(range(devices), str(128 + number))
    assert case.result.complaints == []
    assert f"after batch {STOP};" in case.result.text
    checkpoints = case.folder / "checkpoints"
    assert {file.name for file in checkpoints.iterdir()} == {"last.ckpt", f"step-{STOP:08}.ckpt"}
    assert consumed(last(case.folder)) == STOP
    require_same_state(last(case.folder), read_checkpoint(alone(devices) / "checkpoints" / f"step-{STOP:08}.ckpt"))


@pytest.mark.parametrize(("devices", "moment", "rank", "number"), with_slow(RESUMED, FAST + SLOW))
def test_the_resumed_run_ends_as_the_one_left_alone(devices, moment, rank, number, stopped, alone, tmp_path):
    """Bit for bit; its log has a row a step, that of the signal too, each with the same loss."""
    case = stopped(devices, moment, rank, number)
    assert f"To resume: train-clip train --resume {case.folder}" in case.result.text
    folder = Path(shutil.copytree(case.folder, tmp_path / "run"))
    result = run(["train", "--resume", str(folder), "--callbacks", "null"], processes=devices).require(0)
    assert f"after {STOP} steps and {STOP} batches." in result.text
    require_same_state(last(folder), last(alone(devices)))
    assert [step for step, _ in losses(folder)] == list(range(EPOCHS * BATCHES))
    assert losses(folder) == losses(alone(devices))


def test_a_signal_while_the_second_process_starts_leaves_none_behind(words, tmp_path):
    """SIGTERM to the first process when the second has just been started: both end, though nothing is to be saved."""
    how = ["--devices", "2", "--output", str(tmp_path / "run")]
    process = Command([*words, *how], program=("-m", "moments"), EXIT_CODES=str(tmp_path))
    process.wait_for((tmp_path / "1").exists, "the second process")
    process.process.terminate()
    assert process.end(timeout=60).code in (-TERM, 128 + TERM)


def test_a_signal_within_a_window_of_accumulation_waits_for_its_end(words, tmp_path):
    """Three batches to a step, the signal in the fourth: two steps are done and six batches are saved."""
    when = callback("SignalAt", number=TERM, batch=4)
    run([*words, "--accumulate_grad_batches", "3", "--output", str(tmp_path / "run"), *when]).require(128 + TERM)
    saved = last(tmp_path / "run")
    assert (consumed(saved), saved["global_step"]) == (6, 2)


@pytest.mark.parametrize(("number", "name", "keeps"), [(TERM, "SIGTERM", True), (INT, "Ctrl-C", False)])
def test_a_signal_is_answered_at_once(number, name, keeps, words, tmp_path):
    """While the step is still going on it is said what will happen, and whether anything is saved."""
    when = callback("DeafAt", number=number, batch=STOP, moment="backward")
    how = ["--output", str(tmp_path / "run"), "--enable_checkpointing", str(keeps).lower()]
    said = run([*words, *how, *when]).require(128 + number).text
    then = "saves and stops" if keeps else "stops"
    answer = said.index(
        f"{name}: the run {then} at the end of this step, or of the epoch if this is its last. A second"
    )
    assert answer < said.index("The step goes on.") < said.index(f"Stopped by {name} after batch {STOP};")


def test_one_process_of_two_answers(words, tmp_path):
    """The first one, where both get the signal."""
    how = ["--devices", "2", "--output", str(tmp_path / "run"), *callback("Record", file=str(tmp_path / "record"))]
    both = Command([*words, *how, "--epochs", "1000"], processes=2)
    both.wait_for(lambda: (tmp_path / "record.1").exists(), "a batch")
    for process in both.processes:
        process.terminate()
    assert both.end().require(128 + TERM).text.count("SIGTERM: the run saves and stops") == 1


def test_a_second_signal_ends_the_run_within_the_step(words, tmp_path):
    """It is said, and nothing is saved."""
    when = callback("DeafAt", number=INT, times=2, batch=STOP, moment="backward")
    said = run([*words, "--output", str(tmp_path / "run"), *when]).require(128 + INT).text
    assert "Ctrl-C again: ended without saving." in said
    assert "The step goes on." not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_two_signals_at_a_time_are_one(words, tmp_path):
    """As from ``timeout``, which sends one to the process and one to its group: the run is saved."""
    when = callback("ShellAt", line="kill -TERM $PPID; sleep 0.05; kill -TERM $PPID", batch=STOP)
    run([*words, "--output", str(tmp_path / "run"), *when]).require(128 + TERM)
    assert consumed(last(tmp_path / "run")) == STOP


@pytest.fixture(scope="module")
def told_to_end(words, tmp_path_factory) -> Path:
    """A run of two processes by torchrun, which got SIGTERM after an epoch; with what each had done then."""
    folder = tmp_path_factory.mktemp("torchrun")
    watched = ["--epochs", "1000", *callback("Record", file=str(folder / "record"))]
    process = Command([*words, "--devices", "2", "--output", str(folder / "run"), *watched], program=torchrun())
    files = [folder / f"record.{rank}" for rank in range(2)]
    process.wait_for(
        lambda: all(file.exists() and len(file.read_text().split()) > BATCHES for file in files), "batches"
    )
    process.process.terminate()
    # The exit code is torchrun's own affair; it is not that of success.
    assert process.end().code != 0
    return folder


def test_torchrun_trains_as_one_process_does(told_to_end, alone):
    """Against one process without it: the same loss at each step of the first epoch, a warm-up in both."""
    shared, single = losses(told_to_end / "run")[:BATCHES], losses(alone(1))[:BATCHES]
    assert [step for step, _ in shared] == list(range(BATCHES))
    assert [loss for _, loss in shared] == pytest.approx([loss for _, loss in single], rel=1e-4)


def test_a_signal_to_torchrun_saves_the_last_batch(told_to_end):
    """SIGTERM to torchrun itself, which passes it on: all ranks stop after the same batch, and that one is saved."""
    done = [int((told_to_end / f"record.{rank}").read_text().split()[-1]) for rank in range(2)]
    assert done == [consumed(last(told_to_end / "run"))] * 2
    assert leftovers(told_to_end / "run") == []


def torchrun() -> tuple[str, ...]:
    """The words that start the command on two processes by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = ("--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port)
    return ("-m", "torch.distributed.run", *where, "-m", "train_clip.cli")


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of each row of the log that has one."""
    with (folder / "logs" / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
