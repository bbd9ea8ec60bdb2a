"""The contrastive loss of a batch whose similarities are too many to hold at once.

A few rows at a time meet all columns, and their share of the gradient is taken at once: nothing of them is kept or
computed again. Memory is O((B + N) · D) where the whole matrix takes O(B · N); the idea of tiles is that of Inf-CL
(Cheng et al. 2024, arXiv 2410.17243).

B  pairs on this rank      N  pairs in the global batch      D  embedding width
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2**22  # similarities that are held at a time


def tiles(rows: Tensor, columns: Tensor) -> Iterator[slice]:
    """Cut (B, …) rows into as many at a time as make one tile with (N, …) columns."""
    some = max(1, TILE // max(1, len(columns)))
    for start in range(0, len(rows), some):
        yield slice(start, min(start + some, len(rows)))


def tiled_info_nce(
    rows: Tensor, columns: Tensor, scale: Tensor, offset: int = 0, groups: Tensor | None = None
) -> Tensor:
    """The same as ``info_nce``, which see; its gradient cannot be differentiated again."""
    if not torch.is_grad_enabled():
        rows, columns, scale = rows.detach(), columns.detach(), scale.detach()
    with torch.autocast(rows.device.type, enabled=False):
        loss: Tensor = _TiledInfoNCE.apply(rows, columns, scale, offset, groups)
    return loss


class _TiledInfoNCE(torch.autograd.Function):
    """Loss and gradient in one pass over tiles.

    S = scale · rows columnsᵀ      P = softmax(S)      L = -mean over i of ln P_{i, own}      G = (P - own) / B

    ∂rows = scale · G columns      ∂columns = scale · Gᵀ rows      ∂scale = Σ G ∘ rows columnsᵀ = Σ rows ∘ G columns
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, offset: int, groups: Tensor | None) -> Tensor:
        """Return () float32, or wider where the inputs are."""
        wants_gradient = any(ctx.needs_input_grad)
        dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
        wide_rows, wide_columns = rows.to(dtype), columns.to(dtype)
        loss = torch.zeros((), dtype=dtype, device=rows.device)
        of_rows, of_columns = (torch.zeros_like(side) if wants_gradient else side for side in (wide_rows, wide_columns))
        for tile in tiles(rows, columns):
            own = torch.arange(offset + tile.start, offset + tile.stop, device=rows.device)[:, None]
            similarity = (scale.to(dtype) * wide_rows[tile]) @ wide_columns.T
            if groups is not None:
                others = (groups[own] == groups).scatter_(1, own, False)
                similarity.masked_fill_(others, -torch.inf)
            log_share = similarity.log_softmax(dim=1)
            loss -= log_share.gather(1, own).sum()
            if wants_gradient:
                gradient = torch.exp(log_share, out=similarity)
                gradient.scatter_add_(1, own, torch.full_like(own, -1, dtype=dtype))
                torch.mm(gradient, wide_columns, out=of_rows[tile])
                of_columns.addmm_(gradient.T, wide_rows[tile])
        if wants_gradient:
            of_scale = (wide_rows * of_rows).sum() / len(rows)
            of_rows.mul_(scale / len(rows))
            of_columns.mul_(scale / len(rows))
            ctx.save_for_backward(of_rows.to(rows.dtype), of_columns.to(columns.dtype), of_scale.to(scale.dtype))
        return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient that the forward pass took."""
        return *(upstream.to(part.dtype) * part for part in ctx.saved_tensors), None, None
