"""This process's embeddings → those of all processes, in rank order; and values that processes must agree on.

B  rows on this process      W  processes      D  width
"""

import functools
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

SLICE = timedelta(seconds=1)  # of a wait for others; between two of them Python calls the handlers of signals


class Wait:
    """Since when this process's main thread waits, for other processes or for a batch; 0 where it does not."""

    since = 0.0
    for_batch = False

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since, self.for_batch = 0.0, False

    def lasts(self, seconds: float, from_then_on: float = 0.0) -> bool:
        """Whether it has been waiting for so long, and for so long after another moment."""
        return self.since > 0 and time.monotonic() - max(self.since, from_then_on) > seconds


WAIT = Wait()


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where nothing is distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Gather (B, D) rows, the same B on each of W processes → (W · B, D), with a gradient that flows back.

    The gradient of a row is the sum of what all processes send it. Where each takes the mean over its own rows and the
    parameters' gradients are averaged (DDP), the result is one process's gradient on the global batch.
    """
    return rows if world()[1] == 1 else _Gather.apply(rows)


@torch.no_grad()
def gather_all(rows: Tensor) -> list[Tensor]:
    """Everyone's (B, …) rows, one tensor a rank, without gradient; B may differ, the other sizes and the dtype not."""
    if world()[1] == 1:
        return [rows]
    counts = gather_objects(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(everyone, padded)
    return [part[:count] for part, count in zip(everyone, counts, strict=True)]


def gather_objects(value: Any) -> list[Any]:
    """Everyone's value, any object that pickles, in the order of the ranks. Small ones: they travel as bytes."""
    values = [value] * world()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def largest(values: list[int]) -> list[int]:
    """The largest of each value over all ranks, as many on each, between the hosts: no one waits for a device."""
    if world()[1] == 1:
        return values
    everyones = torch.tensor(values, dtype=torch.int64)
    group: Any = _host_group(distributed.group.WORLD)
    work: Any = distributed.all_reduce(everyones, distributed.ReduceOp.MAX, group=group, async_op=True)
    with WAIT:
        while not work.is_completed():
            try:
                work.wait(SLICE)
            except RuntimeError:
                if work.is_completed():
                    raise  # another process has ended
    return everyones.tolist()


@functools.lru_cache(1)
def _host_group(everyone: Any) -> Any:
    # All ranks make it at once, since making a group is itself a collective: at the first number that they agree on.
    return everyone if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")


def total(values: Tensor) -> Tensor:
    """The sum of everyone's tensor, of one shape and dtype on all ranks; the own one may be overwritten."""
    if world()[1] > 1:
        distributed.all_reduce(values)
    return values


def on_any(flag: Tensor) -> Tensor:
    """Whether a () bool is set on any rank: () float, 0 or 1, on the flag's device, without waiting for it."""
    flag = flag.float()
    if world()[1] > 1:
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return flag


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rank, size = world()
        ctx.length = len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(size)]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # All-reduce and cut, since gloo has no reduce-scatter; of a copy, since others may hold the same gradient.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[ctx.rank * ctx.length : (ctx.rank + 1) * ctx.length]
