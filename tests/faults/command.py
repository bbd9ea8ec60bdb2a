"""Starts the real command as a process of its own, waits for what it does, and reads what it has left."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.conftest import TINY, write_pairs
from tests.forked import Process, ranks, start
from train_clip.checkpoints.own import read_checkpoint

HERE = Path(__file__).parent
PLAIN = ("-m", "train_clip.cli")
MESSAGE = r"train-clip: (?:(?!train-clip: ).)*"  # two processes may write theirs on one line
TIMEOUT = 300  # seconds; where Python starts afresh, that alone takes five to twenty


@dataclass
class Result:
    """What a command ended with.

    Args:
        code: exit code; minus the signal's number where one ended it.
        text: everything that it and its children printed, on both streams.
    """

    code: int
    text: str

    def require(self, code: int) -> Result:
        """This result, if the exit code is the expected one; else what was printed is the failure's message."""
        assert self.code == code, f"exit code {self.code}, expected {code}\n{self.text}"
        return self

    @property
    def messages(self) -> list[str]:
        """What the command says of errors, a line each. Something else may have begun the line on the screen."""
        return re.findall(rf"{MESSAGE}", self.text)

    @property
    def complaints(self) -> list[str]:
        """The same and the beginnings of tracebacks."""
        return re.findall(rf"{MESSAGE}|Traceback .*", self.text)


class Command:
    """A command that runs in a session of its own. What happens to it, none of its processes outlives ``end``.

    Args:
        words: the verb and its options.
        program: what Python runs: the command, or something around it.
        processes: how many to start, which train together; where it is one, ``--devices`` may have it start others.
        environment: variables beside those of the tests.
    """

    def __init__(
        self, words: Sequence[str], program: Sequence[str] = PLAIN, processes: int = 1, **environment: str
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "MASTER_"))}
        clean |= {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])} | environment
        self.printed, writer = os.pipe()
        self.processes = [
            start([*program, *words], env=clean | rank, stdout=writer, stderr=writer) for rank in ranks(processes)
        ]
        os.close(writer)

    @property
    def process(self) -> Process | subprocess.Popen:
        """The only one that was started here, or the first."""
        return self.processes[0]

    def wait_for(self, event: Callable[[], Any], what: str) -> Any:
        """Look every millisecond until an event has come, and return what it is."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := event()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"never came: {what}\n{self.end().text}")
            time.sleep(0.001)
        return found

    def end(self, timeout: float = TIMEOUT, alike: bool = True) -> Result:
        """Wait for the end of the command and of all its children: each of them holds the pipe that is read here.

        Its processes have one exit code, unless they need not be ``alike``.
        """
        printed, deadline = [], time.monotonic() + timeout
        while select.select([self.printed], [], [], deadline - time.monotonic())[0]:
            if not (some := os.read(self.printed, 2**16)):
                break
            printed.append(some)
        else:
            self.kill()
            raise AssertionError(f"it, or a child of it, did not end within {timeout} s\n{b''.join(printed).decode()}")
        os.close(self.printed)
        text, codes = b"".join(printed).decode(), {process.wait() for process in self.processes}
        assert len(codes) == 1 or not alike, f"exit codes {codes}\n{text}"
        return Result(codes.pop(), text)

    def kill(self) -> None:
        """SIGKILL to all its processes that there are."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(words: Sequence[str], program: Sequence[str] = PLAIN, processes: int = 1, **environment: str) -> Result:
    """A command from its start to its end."""
    return Command(words, program, processes, **environment).end()


def write_inputs(folder: Path, pairs: int) -> list[str]:
    """Write a tiny model and some pairs, and return the words that train on them, a step a logged row."""
    model = folder / "tiny.yaml"
    model.write_text(yaml.safe_dump(TINY))
    words = ["train", "--model_name", str(model), "--folder", str(write_pairs(folder / "pairs", pairs))]
    return [*words, *"--batch_size 4 --accelerator cpu --log_every_n_steps 1 --num_workers 0".split()]


def callback(name: str, **arguments: Any) -> list[str]:
    """The words that bring a callback of ``moments.py`` into a run."""
    return ["--callbacks", json.dumps([{"class_path": f"moments.{name}", "init_args": arguments}])]


def consumed(checkpoint: dict[str, Any]) -> int:
    """Global batches that a checkpoint's run had been trained on."""
    return checkpoint["callbacks"]["EndOfStep"]["consumed_batches"]


def last(run_folder: Path) -> dict[str, Any]:
    return read_checkpoint(run_folder / "checkpoints" / "last.ckpt")


def leftovers(run_folder: Path, process: int | str = "") -> list[str]:
    """Temporary files of saves, under way or cut short; only those of one process where its number is given."""
    return sorted(file.name for file in (run_folder / "checkpoints").glob(f"*.tmp-{process}*"))


def require_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints agree bit for bit: weights, optimizer, schedule, and the position in the data."""
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert differences(one[name], other[name], name) == []
    assert consumed(one) == consumed(other)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two nested values of tensors and plain data differ."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [where]
        return [place for key in one for place in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [place for index, (a, b) in pairs for place in differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [where]
