"""How far a scan is: a bar on a terminal, a line now and then in a file."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich import console, progress
from torch.utils.data import DataLoader

from train_clip.data.samples import available_cores

LINE_SECONDS = 15.0  # between lines where there is no terminal
BATCH = 16  # items that travel together from a worker


def in_workers(function: Any, items: Any, num_workers: int | None, what: str) -> Iterator[Any]:
    """Call a function on each item of a sequence in processes, None for one a core, and yield in order."""
    workers = available_cores() if num_workers is None else num_workers
    calls = DataLoader(items, batch_size=BATCH, num_workers=workers, collate_fn=partial(_call, function))
    for batch in with_progress(calls, f"batches of {BATCH} {what}"):
        yield from batch


def _call(function: Any, items: list[Any]) -> list[Any]:
    return list(map(function, items))


def with_progress(loader: Any, what: str) -> Iterator[Any]:
    """Go through something that has a length, and show how many of ``what`` are done."""
    screen = console.Console()
    if screen.is_terminal:
        yield from progress.track(loader, description=what, console=screen, transient=True)
        return
    last = time.perf_counter()
    for number, item in enumerate(loader, 1):
        yield item
        if time.perf_counter() - last > LINE_SECONDS:
            last = time.perf_counter()
            print(f"{number:,} of {len(loader):,} {what}", flush=True)
