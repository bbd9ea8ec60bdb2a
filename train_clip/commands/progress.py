"""How far a scan is and how long it takes: a bar on a terminal, a line now and then in a file."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from torch.utils.data import DataLoader

from train_clip.cores import free_cores
from train_clip.estimates import remaining
from train_clip.printing import progress_bar

FIRST_SECONDS = 5.0  # of work that the first estimate is of, and the least that it speaks of
LINE_SECONDS = 15.0  # between lines where there is no terminal
BATCH = 16  # items that travel together from a worker


def in_workers(function: Any, items: Any, num_workers: int | None, what: str) -> Iterator[Any]:
    """Call a function on each item of a sequence in processes, None for one a core, and yield in order."""
    workers = free_cores() if num_workers is None else num_workers
    calls: Any = DataLoader(items, batch_size=BATCH, num_workers=workers, collate_fn=partial(_call, function))
    for batch in with_progress(calls, what):
        yield from batch


def _call(function: Any, items: list[Any]) -> list[Any]:
    return list(map(function, items))


def with_progress(loader: DataLoader[Any], what: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[Any]:
    """Go through the batches of a loader, and show how many of its items, ``what``, are done and when all will be."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}")
    with progress_bar(*columns, transient=True) as bar:
        task, first, due = bar.add_task(what, total=total, left=""), None, FIRST_SECONDS
        for number, batch in enumerate(loader, 1):
            yield batch
            done, now = min(number * (loader.batch_size or 1), total), clock()
            # Speed is counted from the end of the first batch, when all loader processes have started.
            begun, since = first = first or (done, now)
            seconds = now - since
            left = seconds * (total - done) / (done - begun) if done > begun else 0.0
            bar.update(task, completed=done, left=remaining(left) if seconds >= FIRST_SECONDS else "")
            if bar.disable and seconds >= due and left >= FIRST_SECONDS:
                due = seconds + LINE_SECONDS
                print(f"{done:,} of {total:,} {what}, {(done - begun) / seconds:,.1f}/s: {remaining(left)}", flush=True)
