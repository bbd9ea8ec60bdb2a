"""Encode a batch in chunks: captions without their padding, and a batch that is too large without its activations.

Captions are taken in the order of their lengths, each chunk cut at its longest. Chunks of a size that is asked for are
activation checkpointing over micro-batches: one ordinary backward pass recomputes chunk by chunk, so the gradient is
the full batch's while the memory is a chunk's (the idea of GradCache, Gao et al. 2021, arXiv 2101.06983). Towers with
BatchNorm normalise with each chunk's own statistics.

B  rows of the batch      D  embedding width      L  tokens of the longest caption
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_clip.models.running_statistics import training_norms
from train_clip.training.pooled_norms import PooledNorms
from train_clip.training.seeds import seed_of
from train_clip.transfer import sent

# Captions in the order of their lengths are cut into so many pieces at most, of so many rows at least. Few lengths save
# nearly all the padding, and each piece reads the weights once more (benchmarks/padding.py).
MOST_PIECES = 4
LEAST_ROWS = 64


Rows = Tensor | Mapping[str, Tensor]
"""(B, …), or several tensors of B rows by their names."""

Encode = Callable[[Any, int], Tensor]
"""Maps the rows of a chunk, and its number, to (b, D)."""


@dataclass(frozen=True)
class Chunks:
    """How a batch is cut on one process.

    Args:
        size: rows of a chunk at most, whose activations are computed again in the backward pass; 0, or B and more, for
            a batch that fits as it is.
        kept: the last so many chunks keep their activations, and are not computed again.
        seed: with the chunk's number it decides the random state (dropout) that it is encoded in, both times.
    """

    size: int = 0
    kept: int = 0
    seed: tuple[int, ...] = ()


def encode_in_chunks(
    encode: Callable[[Any], Tensor],
    batch: Rows,
    chunks: Chunks,
    encoder: nn.Module,
    lengths: NDArray[np.int64] | None = None,
) -> Tensor:
    """Encode a batch, holding the activations of few chunks at a time.

    Args:
        encode: maps (b, …) rows to (b, D) embeddings.
        batch: B rows.
        chunks: how it is cut.
        encoder: the module that ``encode`` runs; its BatchNorms are looked after. Where nothing of it is trained there
            is nothing to hold, so that nothing is recomputed.
        lengths: (B,) tokens of each row, the rest of which makes no difference; None where all are looked at.

    Returns:
        (B, D), in the order of the batch.
    """
    # With a BatchNorm among the words the captions that meet in a chunk, and their padding, would make a difference.
    lengths = None if training_norms(encoder) else lengths
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    asked = 1 if chunks.size <= 0 else -(-len(first) // chunks.size)
    number = asked
    if lengths is not None and lengths.min() < lengths.max():
        number = max(number, min(MOST_PIECES, len(first) // LEAST_ROWS))
    # Of the chunks that were asked for: pieces are smaller.
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    recomputed = -(-max(0, asked - chunks.kept) * number // asked) if trained and asked > 1 else 0
    parts, order = _cut(batch, number, lengths)
    seeded = _in_its_random_state(encode, chunks.seed, first)
    if number == 1:
        return seeded(parts[0], 0)
    with PooledNorms(encoder) as norms:
        embeddings = []
        for place, part in enumerate(parts):
            with norms.recording():
                if place < recomputed:
                    embeddings.append(_recomputed(seeded, part, place, norms))
                else:
                    embeddings.append(seeded(part, place))
    joined = torch.cat(embeddings)
    return joined if order is None else joined[order.argsort()]


def _cut(batch: Rows, number: int, lengths: NDArray[np.int64] | None) -> tuple[list[Any], Tensor | None]:
    """Chunks of nearly equal numbers of rows (one row alone is more than some BatchNorms can bear), and their order.

    With lengths the rows are sorted by them, and a chunk ends with its longest; the order is (B,) places in the batch.
    """
    if isinstance(batch, Mapping):
        orders = None
        parts: list[dict[str, Tensor]] = [{} for _ in range(number)]
        for name, rows in batch.items():
            cut, orders = _cut(rows, number, lengths)
            for part, chunk in zip(parts, cut, strict=True):
                part[name] = chunk
        return parts, orders
    if lengths is None:
        return list(batch.tensor_split(number)), None
    if number == 1:
        return [batch[:, : int(lengths.max())] if batch.ndim > 1 else batch], None
    places = np.argsort(lengths, kind="stable")
    longest = [int(lengths[some[-1]]) for some in np.array_split(places, number)]
    order = sent(torch.from_numpy(places), batch.device)
    chunks = zip(batch[order].tensor_split(number), longest, strict=True)
    return [rows[:, :end] if rows.ndim > 1 else rows for rows, end in chunks], order


def _in_its_random_state(encode: Callable[[Any], Tensor], seed: tuple[int, ...], rows: Tensor) -> Encode:
    """Make of ``encode`` what encodes a chunk in the random state of its number; ``rows`` tell the device."""
    devices = [rows.device] if rows.is_cuda else []

    def seeded(chunk: Any, number: int) -> Tensor:
        """Map (b, …) rows to (b, D)."""
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(*seed, number))
            return encode(chunk)

    return seeded


def _recomputed(seeded: Encode, chunk: Any, number: int, norms: PooledNorms) -> Tensor:
    """Encode a chunk, keeping nothing but the embeddings."""
    # ``seeded`` sets the random state itself: checkpoint saves CUDA's only when an argument lies there.
    embeddings = checkpoint(
        seeded,
        chunk,
        number,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), norms.still()),
    )
    return cast(Tensor, embeddings)
