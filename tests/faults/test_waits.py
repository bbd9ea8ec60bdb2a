"""What a run waits for and does not come, or is gone: loader processes, shared memory, other processes, files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from command import PLAIN, Command, callback, consumed, last, require_same_state, run, write_inputs

from train_clip.checkpoints.own import read_checkpoint

PAIRS, EPOCHS, BATCHES = 40, 2, 10  # batches of 4 to one epoch
STOP = 13  # the batch in which it happens, from 1
KILL, TERM, HANG = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGSTOP)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """What all runs have in common."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"), PAIRS)
    return [*inputs, "--val_share", "0", "--epochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Callable[..., Path]:
    """The run with these options that was left alone, with its state after every step kept."""

    @cache
    def train(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("alone") / "run"
        processes = 2 if "--devices" in options else 1
        how = [*options, *"--save_every 1 --keep 99 --output".split(), str(folder)]
        run([*words, *how], processes=processes).require(0)
        return folder

    return train


def require_saved(text: str, folder: Path, alone: Path, batches: int) -> None:
    """It is said; what is saved is the state after so many batches; resumed, the run ends as the one left alone."""
    assert f"fter batch {batches}" in text
    assert f"{folder}/checkpoints/last.ckpt." in text
    assert f"To resume: train-clip train --resume {folder}" in text
    assert consumed(last(folder)) == batches
    step = last(folder)["global_step"]
    require_same_state(last(folder), read_checkpoint(alone / "checkpoints" / f"step-{step:08}.ckpt"))
    run(["train", "--resume", str(folder), "--callbacks", "null", "--num_workers", "0"]).require(0)
    require_same_state(last(folder), last(alone))


@pytest.mark.parametrize(
    ("options", "batch", "kept"),
    [
        ([], STOP, STOP),
        (["--accumulate_grad_batches", "4"], 17, 14),
        (["--val_share", "0.2"], 8, 8),
        (["--val_share", "0.2", "--max_steps", "16"], 8, 8),
        (["--val_share", "0.2", "--val_check_interval", "4"], 4, 4),
    ],
    ids=["in an epoch", "while a gradient is accumulated", "before validation", "of limited steps", "in validation"],
)
def test_a_killed_loader_process_is_told_in_a_line_and_the_run_saved(options, batch, kept, words, alone, tmp_path):
    """As by the kernel for lack of memory, after the update of a step."""
    folder, when = tmp_path / "run", callback("SignalWorkersAt", number=KILL, batch=batch)
    result = run([*words, *options, "--num_workers", "1", "--output", str(folder), *when]).require(1)
    (line,) = result.complaints
    said = r"train-clip: Loader process \d+ was killed by a signal \(Killed\), most likely for lack of memory"
    assert re.match(said, line)
    require_saved(result.text, folder, alone(*options), kept)


def test_a_signal_ends_the_wait_for_a_batch(words, alone, tmp_path):
    """Loader processes that hang, as on a network disk that does not answer: saved within seconds of SIGTERM."""
    folder, hang = tmp_path / "run", callback("SignalWorkersAt", number=HANG, batch=STOP)
    how = ["--num_workers", "1", "--output", str(folder), *hang]
    command = Command([*words, *how], ("-m", "moments"), EXIT_CODES=str(tmp_path))
    command.wait_for(lambda: (tmp_path / "acted").exists(), "batch")
    time.sleep(1)
    begun = time.monotonic()
    command.process.terminate()
    text = command.end(timeout=60).require(128 + TERM).text
    print(time.monotonic() - begun)
    require_saved(text, folder, alone(), STOP)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_of_two_ends_both_and_the_other_saves(rank, words, alone, tmp_path):
    """As by the kernel for lack of memory, in the middle of a step; whichever of the two it is."""
    folder, when = tmp_path / "run", callback("SignalAt", number=KILL, batch=STOP, rank=rank)
    text = Command([*words, "--devices", "2", "--output", str(folder), *when]).end().text
    require_saved(text, folder, alone("--devices", "2"), STOP - 1)


def test_a_fifo_in_the_place_of_an_image_is_a_bad_sample(words, tmp_path):
    """In mid-run, which would wait for ever for somebody to write to it: replaced as any other bad file."""
    pairs = shutil.copytree(words[words.index("--folder") + 1], tmp_path / "pairs")
    swap = f"cd {pairs} && for file in *1.*; do rm $file; mkfifo $file; done"
    how = ["--folder", str(pairs), "--max_bad", "0.5", *callback("ShellAt", line=swap, batch=2)]
    text = run([*words, *how, "--output", str(tmp_path / "run")]).require(0).text
    assert "not a regular file" in text


STARTING = """
import os, signal, time
import torch
from train_clip.data.workers import loader

class Pictures(torch.utils.data.Dataset):
    size, dtype = 16, torch.uint8

    def __len__(self):
        return 8

batches = iter(loader(Pictures(), 2, 2, begin=lambda _: time.sleep(3)))
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_loader_processes_that_start_end_with_a_killed_run():
    """Killed before they looked for whom they work: PyTorch's own watch begins after that, and never ends them."""
    # What is waited for is the end of all that can print.
    ended = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, timeout=30)
    assert ended.returncode == -KILL


def in_small_shared_memory(words: list[str], kilobytes: int) -> subprocess.CompletedProcess[str]:
    """What a command prints where /dev/shm is of that size, as in a container."""
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    line = f"{mount} && exec {shlex.join([sys.executable, *PLAIN, *words])}"
    where = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parent)))}
    return subprocess.run(["unshare", "-m", "sh", "-c", line], env=where, text=True, capture_output=True, timeout=120)


def test_loader_processes_are_as_few_as_shared_memory_has_room_for(words, tmp_path):
    """A batch of 4 pictures of 16×16, and 64 KiB: 68,608 bytes; 2 processes make 2 each ahead, and 2 are in use."""
    ended = in_small_shared_memory([*words, "--num_workers", "2", "--output", str(tmp_path / "run")], 220)
    assert ended.returncode == 0, ended.stderr
    said = "Shared memory (/dev/shm): 225 kB are free, and the batches of 2 loader processes take up to 412 kB; using 1"
    assert said in ended.stdout + ended.stderr


def test_a_batch_that_shared_memory_cannot_take_stops_and_saves_the_run(words, tmp_path):
    """Others fill it in mid-run: PyTorch would drop the batch and wait for it for ever."""
    folder = tmp_path / "run"
    fill = "while :; do cat /dev/zero >> /dev/shm/others; sleep 0.005; done"
    when = callback("ShellAt", line=f"timeout 20 sh -c '{fill}' > /dev/null 2>&1 &", batch=STOP)
    how = ["--num_workers", "1", "--epochs", "1000", "--output", str(folder), *when]
    ended = in_small_shared_memory([*words, *how], 600)
    assert ended.returncode == 1
    assert "train-clip: A loader process could not hand over a batch (unable to" in ended.stderr
    assert "/dev/shm has too little room." in ended.stderr
    assert f"To resume: train-clip train --resume {folder}" in ended.stderr
    assert consumed(last(folder)) >= STOP
