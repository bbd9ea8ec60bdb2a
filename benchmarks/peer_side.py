"""One side of ``peer.py``: a process that trains when it is told to; and what two sides must have in common."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

from peer_cases import Case, to_json

HERE = Path(__file__).resolve().parent
SCRIPTS = {"train-clip": "peer_ours.py", "open_clip": "peer_theirs.py"}
SAME_LOSS = 1e-4  # float32, eval mode
SAME_STEP = 0.05  # the case's precision, of a loss around 3 to 6


class Failed(Exception):
    """A case that cannot be measured, and why; the others go on."""


@dataclass
class Side:
    """One process that trains, and what it said.

    Args:
        who: ``train-clip`` or ``open_clip``.
        mode: ``default`` or ``compiled``.
        process: waits for a line between rounds.
        log: where its standard error goes.
        facts: what it said before the first round.
        rounds: seconds, processor seconds and peak memory of each.
    """

    who: str
    mode: str
    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def hear(self) -> dict[str, Any]:
        """Its next line for this driver.

        Raises:
            Failed: it ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise Failed(f"{self.who}, {self.mode}: ended with {self.process.wait()}.\n{self.log.read_text()[-3000:]}")

    def go(self) -> None:
        """Let it train a round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.hear())

    def end(self) -> None:
        """Have it end, whatever it does."""
        self.process.kill()
        self.process.wait()

    def median(self, name: str) -> float:
        """Over the rounds."""
        return statistics.median(found[name] for found in self.rounds)


def start(who: str, mode: str, case: Case, python: str, folder: Path, threads: int | None = None) -> Side:
    """Start a side's process.

    Args:
        who: ``train-clip`` or ``open_clip``.
        mode: ``default`` or ``compiled``.
        case: what it trains.
        python: what it runs in.
        folder: for the weights, which the first side writes and all begin with, and for its log.
        threads: of its own; the machine's cores where None.
    """
    environment = dict(os.environ)
    if who == "train-clip":
        environment["PYTHONPATH"] = str(HERE.parent)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    log = folder / f"{who}-{mode}.log"
    command = [python, str(HERE / SCRIPTS[who]), to_json(case), str(folder / "weights.pt"), mode]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True, env=environment)
    return Side(who, mode, process, log)


def require_equal_work(sides: list[Side]) -> None:
    """Refuse to compare what is not equal.

    Raises:
        Failed: another number of parameters, or another loss.
    """
    first = sides[0]
    for side in sides[1:]:
        for name, apart in (("parameters", 0), ("checked_loss", SAME_LOSS), ("first_loss", SAME_STEP)):
            ours, theirs = first.facts[name], side.facts[name]
            if not abs(ours - theirs) <= apart:
                raise Failed(f"{name}: {ours} of {first.who}, {theirs} of {side.who} ({side.mode}); expected the same.")
