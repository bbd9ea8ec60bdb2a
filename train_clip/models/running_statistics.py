"""What BatchNorms keep of the batches that they have seen, and how to hold it still.

C  channels of a norm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def training_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a module that are training and keep running statistics."""
    return [
        norm
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
    ]


def get_statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of a norm's running mean (C,), running variance (C,) and () count of batches."""
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    mean, variance, tracked = (cast(Tensor, buffer).clone() for buffer in buffers)
    return mean, variance, tracked


@torch.no_grad()
def set_statistics(norm: _BatchNorm, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
    """Give a norm the statistics of ``get_statistics``."""
    for buffer, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), statistics, strict=True):
        # By ``data``: a chunk that is kept has saved the buffer, which its backward pass in train mode does not read.
        cast(Tensor, buffer).data.copy_(value)


@contextmanager
def momentum(norm: _BatchNorm, value: float) -> Iterator[None]:
    """Another momentum within the block."""
    before, norm.momentum = norm.momentum, value
    try:
        yield
    finally:
        norm.momentum = before


@contextmanager
def still(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Leave running statistics as they are, for a forward pass that is computed a second time."""
    before = [(norm, get_statistics(norm)) for norm in norms]
    with ExitStack() as stack:
        for norm, _ in before:
            stack.enter_context(momentum(norm, 0.0))
        try:
            yield
        finally:
            # ``checkpoint`` leaves a recomputation by an exception, once it has what it needs.
            for norm, statistics in before:
                set_statistics(norm, statistics)
