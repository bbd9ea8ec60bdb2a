"""Encode a batch in chunks and keep only the embeddings: activation checkpointing over micro-batches.

One ordinary backward pass recomputes chunk by chunk, so the gradient is the full batch's while the memory is a chunk's
(the idea of GradCache, Gao et al. 2021, arXiv 2101.06983). Towers with BatchNorm normalise with each chunk's own
statistics; their running statistics get one update a batch, from the pooled mean and variance.

B  rows of the batch      D  embedding width      C  channels      n_k  elements a channel in chunk k      n  Σ n_k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from train_clip.gather import world


def encode_in_chunks(
    encode: Callable[[Any], Tensor],
    batch: Tensor | Mapping[str, Tensor],
    size: int,
    seed: Sequence[int],
    encoder: nn.Module,
) -> Tensor:
    """Encode a batch, holding the activations of at most one chunk at a time.

    Args:
        encode: maps (b, …) rows to (b, D) embeddings.
        batch: (B, …), or several tensors of B rows by their names.
        size: rows of a chunk at most; 0, or B and more, encodes the batch in one piece and recomputes nothing.
        seed: with the chunk's number it decides the random state (dropout) that ``encode`` sees, in the forward pass
            and again in the recomputation.
        encoder: the module that ``encode`` runs; its BatchNorms are looked after. Where nothing of it is trained there
            is nothing to hold, so that nothing is recomputed.

    Returns:
        (B, D).
    """
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    devices = [first.device] if first.is_cuda else []

    def seeded(chunk: Tensor | dict[str, Tensor], number: int) -> Tensor:
        """Encode a chunk in the random state of its own."""
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(np.random.SeedSequence((*seed, number)).generate_state(1, np.uint64)[0] >> 1))
            return encode(chunk)

    if size <= 0 or size >= len(first):
        return seeded(batch if isinstance(batch, Tensor) else dict(batch), 0)
    recomputes = any(parameter.requires_grad for parameter in encoder.parameters())
    with PooledNorms(encoder) as norms:
        embeddings = []
        for number, chunk in enumerate(_split(batch, -(-len(first) // size))):
            with norms.recording():
                # ``seeded`` sets the random state itself: checkpoint saves CUDA's only when an argument lies there.
                embedding = (
                    checkpoint(
                        seeded,
                        chunk,
                        number,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=lambda: (nullcontext(), norms.still()),
                    )
                    if recomputes
                    else seeded(chunk, number)
                )
            embeddings.append(cast(Tensor, embedding))
    return torch.cat(embeddings)


def _split(batch: Tensor | Mapping[str, Tensor], number: int) -> list[Any]:
    """Chunks of nearly equal length: a last one of a single row is more than some BatchNorms can bear."""
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(number))
    parts = {name: rows.tensor_split(number) for name, rows in batch.items()}
    return [{name: chunks[place] for name, chunks in parts.items()} for place in range(number)]


class PooledNorms:
    """The BatchNorms of a module, with one update of their running statistics for a batch that comes in chunks.

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + (mean_k - mean)²) / n        unbiased: var · n / (n - 1)

    As a context: the update is made at its end; after an error the statistics are what they were.

    Args:
        module: searched for BatchNorms that are training and keep running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [
            norm
            for norm in module.modules()
            if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
        ]
        self.before = [_statistics(norm) for norm in self.norms]
        # Of each norm, a (n_k, mean_k, var_k) for each chunk that went through it.
        self.chunks: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self.norms]

    def __enter__(self) -> Self:
        return self

    @torch.no_grad()
    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for norm, before, chunks in zip(self.norms, self.before, self.chunks, strict=True):
            _set_statistics(norm, before)
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
                stack.enter_context(_momentum(norm, 1.0))
                handle = norm.register_forward_pre_hook(count_elements(place))
                stack.callback(handle.remove)
            yield
        for norm, count, chunks in zip(self.norms, counts, self.chunks, strict=True):
            if count:
                mean, variance, _ = _statistics(norm)
                chunks.append((count, mean, variance))

    @contextmanager
    def still(self) -> Iterator[None]:
        """What a chunk's recomputation runs in: it leaves the running statistics as they are."""
        before = [_statistics(norm) for norm in self.norms]
        with ExitStack() as stack:
            for norm in self.norms:
                stack.enter_context(_momentum(norm, 0.0))
            try:
                yield
            finally:
                # ``checkpoint`` leaves a recomputation by an exception, once it has what it needs.
                for norm, statistics in zip(self.norms, before, strict=True):
                    _set_statistics(norm, statistics)


def _update(norm: _BatchNorm, chunks: list[tuple[int, Tensor, Tensor]]) -> None:
    """Give a norm one update from the pooled statistics of its chunks."""
    mean_before, variance_before, tracked = _statistics(norm)
    wide = torch.promote_types(mean_before.dtype, torch.float32)
    counts = torch.tensor([count for count, _, _ in chunks], dtype=wide, device=mean_before.device)[:, None]
    means = torch.stack([mean for _, mean, _ in chunks]).to(wide)
    variances = torch.stack([variance for _, _, variance in chunks]).to(wide)
    total = counts.sum()
    mean = (counts * means).sum(dim=0) / total
    biased = variances * (counts - 1) / counts
    # Squares of differences, not differences of squares, which cancel where the mean is large.
    variance = (counts * (biased + (means - mean) ** 2)).sum(dim=0) / (total - 1)
    # momentum None is a cumulative average (torch.nn.BatchNorm2d).
    momentum = 1 / (int(tracked) + 1) if norm.momentum is None else norm.momentum
    new_mean = mean_before.to(wide).lerp(mean, momentum).to(mean_before.dtype)
    new_variance = variance_before.to(wide).lerp(variance, momentum).to(variance_before.dtype)
    _set_statistics(norm, (new_mean, new_variance, tracked + 1))


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of a norm's running mean (C,), running variance (C,) and () count of batches."""
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    mean, variance, tracked = (cast(Tensor, buffer).clone() for buffer in buffers)
    return mean, variance, tracked


@torch.no_grad()
def _set_statistics(norm: _BatchNorm, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
    for buffer, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), statistics, strict=True):
        cast(Tensor, buffer).copy_(value)


@contextmanager
def _momentum(norm: _BatchNorm, value: float) -> Iterator[None]:
    before, norm.momentum = norm.momentum, value
    try:
        yield
    finally:
        norm.momentum = before


def _processes(norm: nn.Module) -> int:
    """How many processes a norm's statistics span."""
    if not isinstance(norm, nn.SyncBatchNorm):
        return 1
    return world()[1] if norm.process_group is None else distributed.get_world_size(norm.process_group)
