"""Loader processes: their batches fit into the shared memory that there is, and none is waited for in vain."""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing import queues
from pathlib import Path
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from train_clip.errors import UserError, first_line
from train_clip.estimates import size

SHARED = Path("/dev/shm")
IN_USE = 2  # batches that the receiver holds: the one that is trained on, and the next one
BESIDES = 2**16  # bytes, for each batch: captions, whole pages, locks
ENLARGE = "Enlarge it (docker run --shm-size=8g)"


def loader(
    dataset: Any,
    batch_size: int,
    num_workers: int,
    sharers: int = 1,
    begin: Callable[[int], None] | None = None,
    say: Callable[[str], Any] = print,
    **how: Any,
) -> DataLoader[Any]:
    """A ``DataLoader`` of one of this package's data sets, with fewer processes where their batches have no room.

    So many ``sharers`` of its kind are at work on this machine; each process calls ``begin`` first.
    """
    one = 3 * dataset.size**2 * dataset.dtype.itemsize * batch_size
    workers, ahead = fitting(num_workers, sharers * (one + BESIDES), say)
    if workers:
        how |= {"prefetch_factor": ahead, "persistent_workers": True}
    return DataLoader(dataset, batch_size, num_workers=workers, worker_init_fn=partial(_begin, begin), **how)


def fitting(wanted: int, one: int, say: Callable[[str], Any]) -> tuple[int, int]:
    """Processes, and batches that each makes ahead, for which there is room; ``one`` batch has so many bytes."""
    workers, ahead = wanted, 2  # PyTorch's own number
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else float("inf")
    while workers and (ahead * workers + IN_USE) * one > free:
        workers, ahead = (workers, 1) if ahead == 2 else (workers - 1, 1)
    if (workers, ahead) != (wanted, 2):
        say(
            f"Shared memory ({SHARED}): {size(free)} are free, and the batches of {wanted} loader processes take up to "
            f"{size((2 * wanted + IN_USE) * one)}; using {workers}, with {ahead} batch ahead each. {ENLARGE} for more."
        )
    return workers, ahead


def _begin(then: Callable[[int], None] | None, worker: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Else Python prints the error and drops the batch, for which the receiver would wait for ever.
    queues.Queue._on_queue_feeder_error = _hand_over_error  # type: ignore[attr-defined]
    if then is not None:
        then(worker)


def _end_with_parent() -> None:
    # PyTorch looks too, but not for a parent that is gone when its loop begins, nor while the process ends.
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def _hand_over_error(queue: Any, error: Exception, item: Any) -> None:
    reason = first_line(error)
    advice = f"{SHARED} has too little room. {ENLARGE}, or use fewer --num_workers or a smaller --batch_size"
    if "shm" not in reason and "shared memory" not in reason:
        advice = "Use fewer --num_workers; 0 needs none of what processes share"
    failure = UserError(f"A loader process could not hand over a batch ({reason}). {advice}.")
    queue.put((item[0], ExceptionWrapper((UserError, failure, None), where="in a loader process")))
