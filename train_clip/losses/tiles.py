"""The loss of a batch with too many similarities to store at once, in tiles of a few rows with all columns.

Each tile's share of the gradient is taken at once: nothing is kept or computed again. Memory is O((B + N) · D) where
the whole matrix takes O(B · N); the idea is that of Inf-CL (Cheng et al. 2024, arXiv 2410.17243).

B  pairs on this process      N  pairs of the global batch      D  embedding width      b  rows of a tile
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2**22  # similarities that are held at a time

TileLoss = Callable[[Tensor, Tensor, bool], Tensor]
"""(b, N) logits, (b, 1) own columns, whether to overwrite the logits by their gradient → () sum of the rows' losses."""


def tiles(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Cut rows into slices that have ``TILE`` similarities with all the columns at most, or are of one row."""
    at_once = max(1, TILE // max(1, num_columns))
    return (slice(start, start + at_once) for start in range(0, max(1, num_rows), at_once))


def tiled_loss(
    tile_loss: TileLoss,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    offset: int = 0,
    groups: Tensor | None = None,
) -> Tensor:
    """Mean over the rows of their loss against all columns, () float32 or wider, to be differentiated once.

    Args:
        tile_loss: of a tile's logits, scale · rows columnsᵀ + bias.
        inputs: (B, D) rows, this process's of one side, and (N, D) columns, everyone's of the other, float, of unit
            norm; () scale, exp of the learned temperature, at most 100; () bias or None.
        offset: column of this process's first pair.
        groups: (N,) int64: columns equal to a row's own leave its loss, the own one stays. None for all to stay.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        loss: Tensor = _Tiled.apply(*inputs, (tile_loss, offset, groups, torch.is_grad_enabled()))
    return loss


class _Tiled(torch.autograd.Function):
    # Loss and gradient in one pass, with S the logits and G = ∂L/∂S:
    # ∂rows = scale · G columns      ∂columns = scale · Gᵀ rows      ∂scale = Σ rows ∘ G columns      ∂bias = Σ G

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, how: Any) -> Tensor:
        tile_loss, offset, groups, is_recorded = how
        wants_gradient = is_recorded and any(ctx.needs_input_grad)
        dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
        wide_rows, wide_columns = rows.to(dtype), columns.to(dtype)
        loss = of_bias = torch.zeros((), dtype=dtype, device=rows.device)
        of_rows, of_columns = (torch.zeros_like(side) if wants_gradient else side for side in (wide_rows, wide_columns))
        places = torch.arange(offset, offset + len(rows), device=rows.device)[:, None]
        for at in tiles(len(rows), len(columns)):
            some, of_some, own = wide_rows[at], of_rows[at], places[at]
            logits = (scale.to(dtype) * some) @ wide_columns.T
            if bias is not None:
                logits.add_(bias)
            if groups is not None:
                logits.masked_fill_((groups[own] == groups).scatter_(1, own, False), -torch.inf)
            loss = loss + tile_loss(logits, own, wants_gradient)
            if wants_gradient:
                of_bias = of_bias if bias is None else of_bias + logits.sum()
                torch.mm(logits, wide_columns, out=of_some)
                of_columns.addmm_(logits.T, some)
        if wants_gradient:
            of_scale = (wide_rows * of_rows).sum() / len(rows)
            of_rows.mul_(scale / len(rows))
            of_columns.mul_(scale / len(rows))
            parts = [of_rows.to(rows.dtype), of_columns.to(columns.dtype), of_scale.to(scale.dtype)]
            ctx.save_for_backward(*parts, None if bias is None else (of_bias / len(rows)).to(bias.dtype))
        return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (part if part is None else upstream.to(part.dtype) * part for part in ctx.saved_tensors)
        return *scaled, None
