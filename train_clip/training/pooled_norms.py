"""BatchNorms of a batch that comes in chunks: normalised chunk by chunk, one update of the running statistics a batch.

C  channels      n_k  elements a channel in chunk k      n  Σ n_k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train_clip.gather import world
from train_clip.models.running_statistics import get_statistics, momentum, set_statistics, still, training_norms
from train_clip.transfer import sent


class PooledNorms:
    """The BatchNorms of a module, with one update of their running statistics for a batch that comes in chunks.

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + (mean_k - mean)²) / n        unbiased: var · n / (n - 1)

    As a context: the update is made at its end; after an error the statistics are what they were.

    Args:
        module: searched for BatchNorms that are training and keep running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = training_norms(module)
        self.before = [get_statistics(norm) for norm in self.norms]
        # Of each norm, a (n_k, mean_k, var_k) for each chunk that went through it.
        self.chunks: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self.norms]

    def __enter__(self) -> Self:
        return self

    @torch.no_grad()
    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for norm, before, chunks in zip(self.norms, self.before, self.chunks, strict=True):
            set_statistics(norm, before)
            if error is None and chunks:
                _update(norm, chunks)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What a chunk's forward pass runs in: with momentum 1 the running statistics are the chunk's own."""
        counts = [0] * len(self.norms)

        def count_elements(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            """Make the hook that notes how many elements a channel of the norm at a place sees."""

            def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                counts[place] = inputs[0].numel() // inputs[0].shape[1] * _processes(norm)

            return hook

        with ExitStack() as stack:
            for place, norm in enumerate(self.norms):
                stack.enter_context(momentum(norm, 1.0))
                handle = norm.register_forward_pre_hook(count_elements(place))
                stack.callback(handle.remove)
            yield
        for norm, count, chunks in zip(self.norms, counts, self.chunks, strict=True):
            if count:
                mean, variance, _ = get_statistics(norm)
                chunks.append((count, mean, variance))

    def still(self) -> AbstractContextManager[None]:
        """What a chunk's recomputation runs in: it leaves the running statistics as they are."""
        return still(self.norms)


def _update(norm: _BatchNorm, chunks: list[tuple[int, Tensor, Tensor]]) -> None:
    """Give a norm one update from the pooled statistics of its chunks."""
    mean_before, variance_before, tracked = get_statistics(norm)
    wide = torch.promote_types(mean_before.dtype, torch.float32)
    counts = sent(torch.tensor([count for count, _, _ in chunks], dtype=wide), mean_before.device)[:, None]
    means = torch.stack([mean for _, mean, _ in chunks]).to(wide)
    variances = torch.stack([variance for _, _, variance in chunks]).to(wide)
    total = counts.sum()
    mean = (counts * means).sum(dim=0) / total
    biased = variances * (counts - 1) / counts
    # Squares of differences, not differences of squares, which cancel where the mean is large.
    variance = (counts * (biased + (means - mean) ** 2)).sum(dim=0) / (total - 1)
    # momentum None is a cumulative average (torch.nn.BatchNorm2d).
    share = 1 / (int(tracked) + 1) if norm.momentum is None else norm.momentum
    new_mean = mean_before.to(wide).lerp(mean, share).to(mean_before.dtype)
    new_variance = variance_before.to(wide).lerp(variance, share).to(variance_before.dtype)
    set_statistics(norm, (new_mean, new_variance, tracked + 1))


def _processes(norm: nn.Module) -> int:
    """How many processes a norm's statistics span."""
    if not isinstance(norm, nn.SyncBatchNorm):
        return 1
    return world()[1] if norm.process_group is None else distributed.get_world_size(norm.process_group)
