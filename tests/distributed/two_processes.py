"""Runs a function in several processes that talk over gloo, and brings back what each of them returned."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = 120  # seconds; imports alone take some on a loaded machine


def run(function: Callable[[], Any], folder: Path, processes: int = 2) -> list[Any]:
    """Call a function in each process and return the results in the order of the ranks.

    Args:
        function: at the top of a module; takes nothing, returns what ``torch.save`` can write.
        folder: empty, for the rendezvous and the results.
        processes: how many.

    Raises:
        TimeoutError: they hang. They are ended, so that the tests go on.
    """
    context = multiprocessing.spawn(_child, (function, str(folder), processes), processes, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__}: no result from {processes} processes after {TIMEOUT} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _child(rank: int, function: Callable[[], Any], folder: str, processes: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        torch.save(function(), Path(folder) / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
