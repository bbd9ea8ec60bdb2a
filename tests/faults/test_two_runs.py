"""Two runs at once: a folder is one run's, as long as that lives, and no process of it is taken for another run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from command import Command, callback, consumed, last, run, write_inputs
from test_signals import losses

PAIRS, BATCHES = 40, 10  # batches of 4 to one epoch


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """What all runs have in common."""
    return [*write_inputs(tmp_path_factory.mktemp("inputs"), PAIRS), "--val_share", "0", "--epochs", "2"]


def begun(words: list[str], record: Path) -> Command:
    """A run that has done a batch, and goes on once there is a file RECORD.go."""
    first = Command([*words, *callback("Record", file=str(record), until=f"{record}.go")])
    first.wait_for(lambda: record.with_name(f"{record.name}.0").exists(), "a batch")
    return first


def require_refused(words: list[str], folder: Path, first: Command) -> None:
    """A command stops because the first one is using the folder, which it names."""
    (line,) = run([*words, "--callbacks", "null"]).require(1).complaints
    who = f"process {first.process.pid} on {os.uname().nodename}"
    assert re.match(
        rf"train-clip: {folder}: in use by another run \({who} since 2\d\d\d-\d\d-\d\d [\d:]{{8}}\)\. Wait for its "
        rf"end, .* If that process is dead, perhaps with its host, remove {folder}/\.lock\.",
        line,
    )


def test_a_run_that_has_saved_nothing_yet_is_left_alone(words, tmp_path):
    """The same --output before the first checkpoint: the second run is refused, the first ends as if alone."""
    words = [*words, "--output", str(tmp_path / "run")]
    first = begun(words, tmp_path / "record")
    assert not (tmp_path / "run" / "checkpoints").exists()
    require_refused(words, tmp_path / "run", first)
    (tmp_path / "record.go").touch()
    first.end().require(0)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(2 * BATCHES))
    assert consumed(last(tmp_path / "run")) == 2 * BATCHES
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_is_resumed_once_at_a_time(words, tmp_path):
    """The second --resume is refused; after a kill it goes on at once, though a loader process lives on."""
    folder = tmp_path / "run"
    run([*words, "--output", str(folder)]).require(0)
    again = ["train", "--resume", str(folder), "--epochs", "3", "--num_workers", "1"]
    first = begun(again, tmp_path / "record")
    require_refused(again, folder, first)
    os.kill(first.process.pid, signal.SIGKILL)
    run([*again, "--callbacks", "null"]).require(0)
    first.end().require(-9)
    assert consumed(last(folder)) == 3 * BATCHES


def test_two_hosts_share_the_folder_of_their_run(words, tmp_path):
    """Started on each by hand, as Lightning has it: neither is refused, whichever comes first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        main = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for order in (("0", "1"), ("1", "0")):
        words = [*words, "--num_nodes", "2", "--devices", "1", "--output", str(tmp_path / "run")]
        both = [Command(words, NODE_RANK=node, LOCAL_RANK="0", **main) for node in order]
        assert [host.end().require(0).code for host in both] == [0, 0]
        assert [step for step, _ in losses(tmp_path / "run")] == list(range(2 * BATCHES))
        shutil.rmtree(tmp_path / "run")
