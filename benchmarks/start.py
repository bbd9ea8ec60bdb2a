"""How long it takes until something happens: the list of verbs, and the first step of a training run.

    python benchmarks/start.py [--rounds 5]

A training verb's time goes from the start of its process to the end of its first step, of the demo's model on generated
pictures. What a process takes to do no more than ``import torch, lightning`` is measured in turn with it, and taken
off: the rest is this package's own. The median counts; processor time stands beside the wall clock, since other work on
the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from train_clip.commands.demo import write_synthetic

BATCH_SIZE = 128  # the demo's
FIRST_STEP = "first step at "


class StopAtFirstStep(L.Callback):
    """Given to the Trainer by its name: ends the process when the first step is done."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Say when."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"{FIRST_STEP}{time.time()} {used.ru_utime + used.ru_stime}", flush=True)
        os._exit(0)


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description="How long it takes until something happens.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    command = [sys.executable, "-m", "train_clip.cli"]
    with tempfile.TemporaryDirectory() as folder:
        training, _ = write_synthetic(Path(folder, "data"), 1, 0)
        train = [*command, "train", "--model_name", "demo-8-48px", "--folder", str(training), "--max_steps", "1"]
        train += ["--batch_size", str(BATCH_SIZE), "--callbacks", "{class_path: start.StopAtFirstStep}"]
        train += ["--output", str(Path(folder, "run"))]
        help_times, imports, verbs = [], [], []
        for number in range(rounds):
            help_times.append(whole([*command, "--help"]))
            imports.append(whole([sys.executable, "-c", "import torch, lightning"]))
            verbs.append(until_first_step([*train[:-1], train[-1] + str(number)]))
    alone, verb = median(imports), median(verbs)
    own = (verb[0] - alone[0], verb[1] - alone[1])
    for name, (seconds, processor) in (
        ("train-clip --help", median(help_times)),
        ("import torch, lightning", alone),
        ("train-clip train, first step", verb),
        ("of it this package's own", own),
    ):
        print(f"{name:30}  {seconds:5.2f} s, {processor:5.2f} s of processor time")


def whole(command: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def until_first_step(command: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds of a training run, until ``StopAtFirstStep`` ends it.

    Raises:
        SystemExit: it ended before.
    """
    paths = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    started = time.time()
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    for line in ended.stdout.splitlines():
        if line.startswith(FIRST_STEP):
            at, processor = map(float, line.removeprefix(FIRST_STEP).split())
            return at - started, processor
    sys.exit(f"{' '.join(command)}\n{ended.stdout[-3000:]}")


def median(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Of seconds, and of processor seconds."""
    seconds, processor = zip(*times, strict=True)
    return statistics.median(seconds), statistics.median(processor)


if __name__ == "__main__":
    main()
