"""What both sides of ``peer.py`` share: the same pairs, and a loader that times rounds of steps on request.

The loader holds ready batches, so that a step is all that is timed. It steps ahead only when the driver asks for a
round, by a line on standard input, and answers with a line on standard output; between rounds the other side runs.

B  pairs      S  side of the image in pixels
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_cases import Case
from PIL import Image

MARK = "@"  # begins a line for the driver
CHECKED = 32  # pairs of the first batch on which the two losses are compared
PICTURES = (".png", ".jpg", ".jpeg")
# Short common words, each one token of CLIP's vocabulary.
WORDS = (
    "a the of in on with and at by red blue green white black small big old new man woman child dog cat bird horse "
    "car train boat house tree flower river sea sky sun moon star street table chair cup book hat coat shoe ball"
).split()


def pairs(case: Case, size: int, number: int) -> tuple[torch.Tensor, list[str]]:
    """The pairs of a batch, the same on both sides.

    Args:
        case: how many, and of what captions.
        size: S.
        number: of the batch.

    Returns:
        (B, 3, S, S) uint8, and B captions.
    """
    if case.folder is not None:
        return _pairs_of(Path(case.folder), case.batch, size, number)
    draw, rng = random.Random(number), np.random.default_rng(number)
    captions = [" ".join(draw.choices(WORDS, k=draw.randint(*case.words))) for _ in range(case.batch)]
    return torch.from_numpy(rng.integers(0, 256, (case.batch, 3, size, size), np.uint8)), captions


def _pairs_of(folder: Path, batch: int, size: int, number: int) -> tuple[torch.Tensor, list[str]]:
    """Pairs of a folder drawn by the batch's number, squeezed to the size; what is transparent is white."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES]
    files = [file for file in files if file.with_suffix(".txt").is_file()]
    if not files:
        sys.exit(f"{folder}: no image with a caption of the same stem; expected some.")
    pixels, captions = [], []
    for file in random.Random(number).choices(files, k=batch):
        picture = Image.open(file).convert("RGBA").resize((size, size))
        white = Image.new("RGBA", picture.size, "white")
        pixels.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
        captions.append(file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), captions


def num_distinct(case: Case) -> int:
    """Batches that differ; the paper's batch is 5 GB, and comes again and again."""
    return 2 if case.batch <= 4096 else 1


def say(**figures: Any) -> None:
    """Send figures to the driver."""
    print(MARK + json.dumps(figures), flush=True)


class Rounds:
    """A loader of ready batches, which waits for the driver before each round.

    Args:
        case: what is measured.
        batches: each a list of what one step takes: one batch, or the micro-batches of the peer's accumulation.
    """

    def __init__(self, case: Case, batches: list[list[Any]]) -> None:
        self.case = case
        self.batches = batches
        # Those that the peer's loop reads; the driver ends the run long before.
        self.num_batches = 10_000 * len(batches[0])
        self.num_samples = 10_000 * case.batch
        self.first_loss: torch.Tensor | None = None
        self.facts: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        before = memory_now()
        yield from self._steps(self.case.warmup)
        loss = None if self.first_loss is None else float(self.first_loss)
        give_back()
        say(before=before, first_loss=loss, torch=torch.__version__, **self.facts)
        while sys.stdin.readline().strip() == "go":
            if torch.cuda.is_available():
                # What was given back to the device between rounds is fetched again, off the clock.
                yield from self._steps(1)
            started, spent = clock(), processor_seconds()
            yield from self._steps(self.case.steps)
            seconds = (clock() - started) / self.case.steps
            say(seconds=seconds, processor=(processor_seconds() - spent) / self.case.steps, peak=peak_memory())
            give_back()
        # The training loops around this one have no part in the end.
        os._exit(0)

    def _steps(self, number: int) -> Iterator[Any]:
        for step in range(number):
            yield from self.batches[step % len(self.batches)]

    def note_loss(self, loss: torch.Tensor) -> None:
        """Keep the first step's loss."""
        if self.first_loss is None:
            self.first_loss = loss.detach()


def give_back() -> None:
    """Leave the device's memory to the other side, all but weights and moments."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def exact() -> Iterator[None]:
    """Compute without gradient, in float32 that is not shortened (TF32)."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    with torch.no_grad():
        yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def processor_seconds() -> float:
    """Of all threads of this process: on a shared machine it varies less than the wall clock."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory_now() -> int:
    """Bytes before the first step: on a CPU the largest resident size so far."""
    if torch.cuda.is_available():
        # The peak is the training's.
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return peak_memory()


def peak_memory() -> int:
    """Bytes: the allocator's peak on a GPU, the largest resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """As loaders with ``pin_memory`` give it."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
