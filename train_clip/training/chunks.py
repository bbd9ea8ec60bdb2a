"""Encode a batch in chunks and keep only the embeddings: activation checkpointing over micro-batches.

One ordinary backward pass recomputes chunk by chunk, so the gradient is the full batch's while the memory is a chunk's
(the idea of GradCache, Gao et al. 2021, arXiv 2101.06983). Towers with BatchNorm normalise with each chunk's own
statistics; their running statistics get one update a batch, from the pooled mean and variance.

B  rows of the batch      D  embedding width      C  channels      n_k  elements a channel in chunk k      n  Σ n_k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from train_clip.gather import world


def encode_in_chunks(
    encode: Callable[[Tensor], Tensor],
    batch: Tensor,
    size: int,
    seed: Sequence[int],
    encoder: nn.Module,
) -> Tensor:
    """Encode a batch, holding the activations of at most one chunk at a time.

    Args:
        encode: maps (b, …) rows to (b, D) embeddings.
        batch: (B, …).
        size: rows of a chunk; 0, or B and more, encodes the batch in one piece and recomputes nothing.
        seed: with the chunk's number it decides the random state (dropout) that ``encode`` sees, in the forward pass
            and again in the recomputation.
        encoder: the module that ``encode`` runs; its BatchNorms are looked after.

    Returns:
        (B, D).
    """

    def seeded(chunk: Tensor, number: int) -> Tensor:
        torch.manual_seed(int(np.random.SeedSequence((*seed, number)).generate_state(1, np.uint64)[0] >> 1))
        return encode(chunk)

    if size <= 0 or size >= len(batch):
        return seeded(batch, 0)
    norms = PooledNorms(encoder)
    embeddings = [
        cast(
            Tensor,
            checkpoint(
                seeded,
                chunk,
                number,
                use_reentrant=False,
                # ``seeded`` sets the random state itself: checkpoint saves CUDA's only when an argument lies there.
                preserve_rng_state=False,
                context_fn=norms.contexts,
            ),
        )
        for number, chunk in enumerate(batch.split(size))
    ]
    norms.update()
    return torch.cat(embeddings)


class PooledNorms:
    """The BatchNorms of a module, with one update of their running statistics for a batch that comes in chunks.

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + mean_k²) / n - mean²        unbiased: var · n / (n - 1)

    Args:
        module: searched for BatchNorms that are training and keep running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [
            norm
            for norm in module.modules()
            if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
        ]
        self.before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self.norms]  # type: ignore
        self.chunks: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self.norms]

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What a chunk's forward pass and its recomputation run in, as ``checkpoint`` wants them."""
        return self._recording(), self._still()

    @torch.no_grad()
    def update(self) -> None:
        """Set the running statistics from those of all chunks."""
        for norm, (mean_before, variance_before), chunks in zip(self.norms, self.before, self.chunks, strict=True):
            counts = torch.tensor([count for count, _, _ in chunks], dtype=mean_before.dtype, device=mean_before.device)
            means = torch.stack([mean for _, mean, _ in chunks])
            variances = torch.stack([variance for _, _, variance in chunks])
            total, weights = counts.sum(), (counts / counts.sum())[:, None]
            mean = (weights * means).sum(dim=0)
            biased = variances * ((counts - 1) / counts)[:, None]
            variance = ((weights * (biased + means**2)).sum(dim=0) - mean**2) * total / (total - 1)
            tracked = cast(Tensor, norm.num_batches_tracked)
            tracked += 1 - len(chunks)
            # momentum None is a cumulative average (torch.nn.BatchNorm2d).
            momentum = 1 / int(tracked) if norm.momentum is None else norm.momentum
            cast(Tensor, norm.running_mean).copy_(mean_before.lerp(mean, momentum))
            cast(Tensor, norm.running_var).copy_(variance_before.lerp(variance, momentum))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """With momentum 1 the running statistics are the chunk's own, to be read afterwards."""
        counts = [0] * len(self.norms)

        def count_elements(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
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
            chunks.append((count, norm.running_mean.clone(), norm.running_var.clone()))  # type: ignore

    @contextmanager
    def _still(self) -> Iterator[None]:
        """With momentum 0 the recomputation leaves the running statistics as they are."""
        tracked = [norm.num_batches_tracked.clone() for norm in self.norms]  # type: ignore[union-attr]
        with ExitStack() as stack:
            for norm in self.norms:
                stack.enter_context(_momentum(norm, 0.0))
            yield
        for norm, number in zip(self.norms, tracked, strict=True):
            norm.num_batches_tracked.copy_(number)  # type: ignore[union-attr]


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
