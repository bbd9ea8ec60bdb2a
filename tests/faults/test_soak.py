"""Runs that are interrupted again and again, where memory and disk are small, end as the run that was left alone.

``SOAK_SECONDS=1800 pytest -m slow -s tests/faults/test_soak.py`` takes half an hour. ``SOAK_FAULTS="killed full_disk"``
has these faults alone, ``SOAK_PROCESSES=1`` runs on one process alone, ``SOAK_STARTS=0`` none while a run starts.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
from command import Command, Result, callback, consumed, last, require_same_state, run, write_inputs

from train_clip.checkpoints.own import read_checkpoint

SECONDS = float(os.environ.get("SOAK_SECONDS", "90"))
SHM, DISK = "64m", "60m"  # of /dev/shm, as in a container; of the disk of a run, with room for six checkpoints
PAIRS, BATCHES, EPOCHS = 40, 10, 30  # batches of 4 to one epoch
PROCESSES = [int(number) for number in os.environ.get("SOAK_PROCESSES", "1 2").split()]
STARTS = float(os.environ.get("SOAK_STARTS", "0.2"))  # share of the faults that come while a run starts
INTERVAL = 7  # optimizer steps between saves
PAUSE = 0.02  # seconds a batch
LIMIT = 90.0  # seconds within which a run has ended after a fault: far more than any is to take
# Mounts of its own, which end with the process.
PRIVATE = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]


@dataclass
class Scene:
    """What a fault may happen to."""

    command: Command
    disk: Path  # where the run is written
    data: Path
    rng: random.Random

    def one(self) -> int:
        """The run's process, or one that it has started to train beside it."""
        first = self.command.process.pid
        found = [first]
        with suppress(OSError):  # one that has ended by now
            for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
                if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                    found.append(int(child))
        return self.rng.choice(found)


Fault = Callable[[Scene], AbstractContextManager[None]]


def sent(*numbers: signal.Signals) -> Fault:
    """Signals to one of the run's processes, a second apart."""

    @contextmanager
    def send(scene: Scene) -> Iterator[None]:
        process = scene.one()
        for place, number in enumerate(numbers):
            time.sleep(min(place, 1))
            try_kill(process, number)
        yield

    return send


@contextmanager
def killed(scene: Scene) -> Iterator[None]:
    """All processes at once, as by a machine that is switched off."""
    scene.command.kill()
    yield


@contextmanager
def worker_killed(scene: Scene) -> Iterator[None]:
    """A loader process, as by the kernel where memory runs out; before there is one, the run itself."""
    process = scene.one()
    children = Path(f"/proc/{process}/task/{process}/children")
    try_kill(scene.rng.choice((children.read_text() if children.exists() else "").split() or [process]), signal.SIGKILL)
    yield


def filled(which: str) -> Fault:
    """A disk on which nothing is left, until the run has ended."""

    @contextmanager
    def fill(scene: Scene) -> Iterator[None]:
        others = (scene.disk if which == "disk" else Path(which)) / "others"
        with others.open("wb", buffering=0) as file:
            for _ in range(20):  # for a second: what is given back in that time is taken too
                with suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                time.sleep(0.05)
        yield
        others.unlink()

    return fill


@contextmanager
def data_gone(scene: Scene) -> Iterator[None]:
    """A folder that is not there, as of a server that is not reachable, until the run has ended."""
    elsewhere = scene.data.rename(scene.data.with_name("elsewhere"))
    yield
    elsewhere.rename(scene.data)


FAULTS: dict[str, Fault] = {
    "killed": killed,
    "one_killed": sent(signal.SIGKILL),
    "worker_killed": worker_killed,
    "term": sent(signal.SIGTERM),
    "ctrl_c": sent(signal.SIGINT),
    "twice": sent(signal.SIGTERM, signal.SIGTERM),
    "held_up": sent(signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM),
    "hangup": sent(signal.SIGHUP),
    "full_disk": filled("disk"),
    "full_shm": filled("/dev/shm"),
    "data_gone": data_gone,
}


@pytest.mark.slow
def test_interrupted_runs_end_as_the_one_left_alone(tmp_path):
    """Kills, signals, full disks and vanished data at random moments: each round ends in time, no checkpoint is lost.

    On one process and on two, with loader processes. All of it by a seed, but for the time that things take.
    """
    tried = subprocess.run([*PRIVATE, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs the right to mount: {tried.stderr.strip()}")
    there = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(Path(__file__).parent)])}
    subprocess.run([*PRIVATE, sys.executable, __file__, tmp_path], env=os.environ | there, check=True)


def soak(folder: Path, seconds: float, faults: list[str]) -> None:
    """Interrupt runs for so long, one after the other; the last one is then left to its end."""
    disk, rng, rounds = folder / "disk", random.Random(0), Counter[str]()
    disk.mkdir()
    for place, size in (("/dev/shm", SHM), (disk, DISK)):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    inputs = [*write_inputs(folder, PAIRS), *f"--val_share 0 --epochs {EPOCHS} --save_every {INTERVAL}".split()]
    words = {number: [*inputs, *f"--devices {number} --num_workers {3 - number}".split()] for number in PROCESSES}
    # On each number of processes a sum has its own rounding.
    alone = {number: folder / f"alone-{number}" for number in PROCESSES}
    for number, output in alone.items():
        run([*words[number], "--output", str(output)], processes=number).require(0)
    deadline = time.monotonic() + seconds
    for number, processes in enumerate(cycle(PROCESSES)):
        done, record = disk / f"run-{number}", folder / f"record-{number}"
        start = [*words[processes], "--output", str(done), *callback("Record", file=str(record), pause=PAUSE)]
        while newest(done) < EPOCHS * BATCHES:
            before, begun = newest(done), time.monotonic()
            name = rng.choice(faults) if begun < deadline else "none"
            if not before:
                # What has no checkpoint yet cannot go on.
                shutil.rmtree(done, ignore_errors=True)
            print(f"run {number}, {processes} processes, {name}:", end=" ", flush=True)
            command = Command(["train", "--resume", str(done)] if before else start)
            result = interrupted(name, Scene(command, disk, folder / "pairs", rng), record)
            rounds[name] += 1
            took = time.monotonic() - begun
            print(f"{before} to {newest(done)}, {took:.0f} s", flush=True)
            assert newest(done) >= before, result.text
            assert name != "none" or newest(done) == EPOCHS * BATCHES, result.text
        require_same_state(last(done), last(alone[processes]))
        shutil.rmtree(done)
        if time.monotonic() > deadline:
            break
    left = sum(file.stat().st_size for file in Path("/dev/shm").iterdir())
    print(f"{number + 1} runs, all as the ones left alone; {left} bytes left in /dev/shm; {dict(rounds)}")
    assert left < 2**20


def interrupted(name: str, scene: Scene, record: Path) -> Result:
    """Let something happen to a run, while it starts or while it trains, and wait for its end."""
    steps = record.with_name(f"{record.name}.0")
    before = steps.stat().st_size if steps.exists() else 0
    if name == "none":
        return scene.command.end(LIMIT + 2 * PAUSE * EPOCHS * BATCHES)
    if scene.rng.random() >= STARTS:
        limit = time.monotonic() + LIMIT
        while scene.command.process.poll() is None and not (steps.exists() and steps.stat().st_size > before):
            assert time.monotonic() < limit, scene.command.end(0).text
            time.sleep(0.01)
    time.sleep(scene.rng.uniform(0, 2))
    with FAULTS[name](scene):
        return scene.command.end(LIMIT, alike=False)


def newest(folder: Path) -> int:
    """Batches that the newest of a run's checkpoints has been trained on, all of which load; 0 where there is none."""
    return max((consumed(read_checkpoint(file)) for file in (folder / "checkpoints").glob("*.ckpt")), default=0)


def try_kill(process: int | str, number: signal.Signals) -> None:
    """Send a signal to what may have ended by now."""
    with suppress(ProcessLookupError):
        os.kill(int(process), number)


if __name__ == "__main__":
    soak(Path(sys.argv[1]), SECONDS, os.environ.get("SOAK_FAULTS", " ".join(FAULTS)).split())
