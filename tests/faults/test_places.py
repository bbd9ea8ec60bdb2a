"""Where a run reads, writes and prints: folders that vanish, terminals that close, limits and variables of others."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from command import PLAIN, Command, callback, consumed, last, require_same_state, run, write_inputs
from test_disk import mount

from tests import forked
from train_clip.checkpoints.own import read_checkpoint
from train_clip.data.scan import GONE
from train_clip.shards.write import ShardOptions, data_shards

PAIRS, BATCHES = 40, 8  # batches of 4 to one epoch; a fifth is held out
EVERY = 3  # optimizer steps between saves


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny model and some pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, PAIRS)
    return folder


@pytest.fixture(scope="module")
def words(inputs) -> list[str]:
    """What all runs have in common but the data."""
    how = f"train --model_name {inputs}/tiny.yaml --val_share 0.2 --epochs 2 --batch_size 4 --accelerator cpu"
    return [*how.split(), *f"--log_every_n_steps 1 --save_every {EVERY}".split()]


@pytest.fixture
def pairs(inputs, tmp_path) -> Path:
    """A folder of pairs to harm."""
    return Path(shutil.copytree(inputs / "pairs", tmp_path / "pairs"))


@pytest.fixture(scope="module")
def finished(words, inputs, tmp_path_factory) -> Path:
    """The run that was left alone."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run([*words, "--num_workers", "0", "--folder", str(inputs / "pairs"), "--output", str(folder)]).require(0)
    return folder


# Data that vanish


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_vanishes_is_named_and_the_run_goes_on_after_its_return(
    workers, words, pairs, finished, tmp_path
):
    """Moved away within an epoch: one line with the folder, not with a sample; once it is back, nothing is lost."""
    away = tmp_path / "away"
    move = callback("ShellAt", line=f"mv {pairs} {away}", batch=EVERY + 1)
    how = ["--num_workers", str(workers), "--folder", str(pairs), "--output", str(tmp_path / "run")]
    result = run([*words, *how, *move]).require(1)
    (line,) = result.complaints
    # The loader processes have most often read all that is to be trained on by then.
    numbers = [8, 32] if workers else [32]
    assert any(line.startswith(f"train-clip: {pairs}: {GONE}, as of all {number} files of the") for number in numbers)
    assert "Skipped" not in result.text
    # What was trained is saved.
    assert EVERY + 1 <= consumed(last(tmp_path / "run")) <= (BATCHES if workers else EVERY + 1)
    away.rename(pairs)
    run(["train", "--resume", str(tmp_path / "run"), "--callbacks", "null"]).require(0)
    require_same_state(last(tmp_path / "run"), last(finished))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mount_that_is_lost_is_no_matter_of_single_files(workers, words, pairs, tmp_path):
    """The folder is there and empty; the files that were held out are gone just before the validation."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    mount("--bind", pairs, mounted)
    try:
        drop = callback("ShellAt", line=f"umount --lazy {mounted}", batch=BATCHES, moment="update")
        how = ["--num_workers", str(workers), "--folder", str(mounted), "--output", str(tmp_path / "run")]
        result = run([*words, *how, "--num_sanity_val_steps", "0", *drop]).require(1)
    finally:
        subprocess.run(["umount", "--lazy", "--quiet", mounted], check=False)
    (line,) = result.complaints
    assert f"{GONE}, as of all" in line
    assert f"{mounted}/" in line
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(("workers", "line"), [(0, "truncate -s 700"), (1, "truncate -s 0"), (1, "rm")])
def test_a_shard_that_is_cut_or_vanishes_is_named_and_the_run_goes_on_after_its_return(
    workers, line, words, inputs, tmp_path
):
    """No bad samples: one line with the shard, what was trained is saved, and nothing is lost once it is back."""
    shards, kept = tmp_path / "shards", tmp_path / "kept"
    data_shards(inputs / "pairs", options=ShardOptions(output=shards, pairs_per_shard=7, num_workers=0))
    shutil.copytree(shards, kept)
    how = ["--num_workers", str(workers), "--shards", str(shards), "--output", str(tmp_path / "run")]
    harm = callback("ShellAt", line=f"{line} {shards}/*.tar", batch=EVERY + 1)
    result = run([*words, *how, *harm]).require(1)
    (said,) = result.complaints
    assert said.startswith(f"train-clip: {shards}/0000")
    assert ("there is no such file" if line == "rm" else "ends before") in said
    assert "Skipped" not in result.text
    assert EVERY + 1 <= consumed(last(tmp_path / "run")) <= BATCHES
    shutil.copytree(kept, shards, dirs_exist_ok=True)
    run(["train", "--resume", str(tmp_path / "run"), "--callbacks", "null"]).require(0)
    run([*words, "--num_workers", "0", "--shards", str(kept), "--output", str(tmp_path / "whole")]).require(0)
    require_same_state(last(tmp_path / "run"), last(tmp_path / "whole"))


# Streams


def test_a_hangup_that_is_ignored_stops_nothing(words, inputs, tmp_path):
    """As under nohup, and again while loader processes are at work."""
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from train_clip import cli; cli.main()"
    how = ["--num_workers", "1", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run")]
    hangup = callback("SignalAt", number=int(signal.SIGHUP), batch=EVERY)
    assert "Done after 16 steps" in run([*words, *how, *hangup], ("-c", ignoring)).require(0).text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_terminal_that_closes_saves(workers, words, inputs, tmp_path):
    """Nobody reads any more, and SIGHUP comes twice, to the loader process too: exit code 129, the step is saved."""
    main, terminal = pty.openpty()
    line = "sleep 0.7; kill -HUP -$PPID; sleep 0.7; kill -HUP -$PPID"
    when = callback("ShellAt", line=f"trap '' HUP; {line}", batch=EVERY + 1)
    how = ["--num_workers", str(workers), "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run")]
    process = forked.start([*PLAIN, *words, *how, *when], stdout=terminal, stderr=terminal, env=command_variables())
    os.close(terminal)
    assert os.read(main, 1)
    os.close(main)
    assert process.wait(120) == 128 + signal.SIGHUP
    assert consumed(last(tmp_path / "run")) == EVERY + 1


@pytest.mark.parametrize("streams", ["reader leaves", "full", "terminal", "closed"])
def test_what_cannot_be_printed_ends_no_run(streams, words, inputs, finished, tmp_path):
    """A pipe whose reader has read a line, a disk that is full, a terminal that is gone, none at all: exit code 0."""
    how = ["--num_workers", "0", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run")]
    program = PLAIN
    if streams == "terminal":
        reader, writer = pty.openpty()
    elif streams == "full":
        reader, writer = os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
    if streams == "closed":
        close = "os.close(1); os.close(2); sys.stdout = sys.stderr = None"
        program = ("-c", f"import os, sys; {close}; from train_clip import cli; cli.main()")
    process = forked.start([*program, *words, *how], stdout=writer, stderr=writer, env=command_variables())
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    assert process.wait(120) == 0
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    require_same_state(last(tmp_path / "run"), last(finished))


def command_variables() -> dict[str, str]:
    """The variables that ``Command`` gives to its processes."""
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)])}


# Where saves go


@pytest.mark.parametrize("place", ["checkpoints", "logs"])
def test_what_cannot_be_saved_is_told_before_training(place, finished, tmp_path):
    """A folder of the run that turned read-only, on --resume: one line with its name, before the first step."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    mount("--bind", folder / place, folder / place)
    try:
        mount("-o", "remount,bind,ro", folder / place)
        result = run(["train", "--resume", str(folder), "--epochs", "3"]).require(1)
    finally:
        subprocess.run(["umount", "--lazy", folder / place], check=True)
    assert result.complaints == [
        f"train-clip: {folder}/{place}: no file can be written there (Read-only file system). Allow writing, or give "
        "another --output."
    ]
    assert "step " not in result.text


def test_a_disk_with_room_for_one_checkpoint_is_told_before_training(words, inputs, tmp_path):
    """The second would not fit beside the first; the size of one is said."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=15m", "tmpfs", disk)
    try:
        how = ["--num_workers", "0", "--folder", str(inputs / "pairs"), "--output", str(disk / "run")]
        (line,) = run([*words, *how]).require(1).complaints
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert "16 MB of disk space are free. Expected room for 19 MB, which the run's checkpoints take (10 MB each" in line


# The environment


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1, WORLD_SIZE=2: does not fit --devices and --num_nodes, by"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: does not fit"),
        ({"SLURM_PROCID": "3"}, "unset SLURM_PROCID."),
        ({"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "192.0.2.1"}, "unset WORLD_SIZE."),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='': in the environment, where launchers set a number: unset LOCAL_RANK."),
        ({"SLURM_NTASKS": "4(x2)"}, "SLURM_NTASKS='4(x2)': in the environment"),
    ],
)
def test_a_place_in_another_run_is_refused(variables, expected, words, inputs, tmp_path):
    """What torchrun or srun has left in the environment of a run of one process: named, and nothing is written."""
    how = ["--num_workers", "0", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run")]
    (line,) = run([*words, *how], **variables).require(2).complaints
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_place_that_fits_hinders_no_run_on_two_processes(words, inputs, tmp_path):
    """The address of a host that is gone, and a first rank: the second process is started, and both train."""
    left = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    how = ["--num_workers", "0", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run"), "--devices", "2"]
    assert "Done after 16 steps" in run([*words, *how], **left).require(0).text


def test_who_waits_for_other_processes_says_so(words, inputs, tmp_path):
    """A local rank is set, as where each process is started by hand: it is said before the wait."""
    how = ["--num_workers", "0", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run"), "--devices", "2"]
    waiting = Command([*words, *how], LOCAL_RANK="0", MASTER_PORT="0")
    said = b""
    while b"unset LOCAL_RANK." not in said:
        assert select.select([waiting.printed], [], [], 60)[0], said
        said += os.read(waiting.printed, 2**16)
    assert b"LOCAL_RANK is set: waiting for the other 1 processes" in said
    waiting.kill()
    waiting.end()


@pytest.mark.parametrize(("soft", "hard", "code"), [(32, 128, 0), (32, 40, 1)])
def test_loader_processes_get_the_open_files_they_need(soft, hard, code, words, inputs, tmp_path):
    """Three of them: the limit is raised where that is allowed, else the most that fit are named before training."""
    limit = (
        f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard})); from train_clip import cli; cli.main()"
    )
    how = ["--num_workers", "3", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run")]
    result = run([*words, *how], ("-c", limit)).require(code)
    if code:
        (line,) = result.complaints
        assert "--num_workers 3: needs 112 open files; at most 40 are allowed. Use up to 0, or" in line
    assert ("step " in result.text) == (code == 0)


def test_a_process_that_cannot_be_started_is_no_traceback(words, inputs, tmp_path):
    """The system refuses another process, as where a container's limit is reached: one line with what to do."""
    fail = "OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))"
    patch = f"import errno, os; from unittest import mock; mock.patch('os.fork', side_effect={fail}).start()"
    how = ["--num_workers", "1", "--folder", str(inputs / "pairs"), "--output", str(tmp_path / "run")]
    result = run([*words, *how], ("-c", f"{patch}; from train_clip import cli; cli.main()")).require(1)
    (line,) = result.complaints
    assert "Resource temporarily unavailable. Expected fewer loader processes (--num_workers), or higher limits" in line
