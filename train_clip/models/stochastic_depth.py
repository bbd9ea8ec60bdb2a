"""Stochastic depth: in training a block is left out for some rows by chance (Huang et al. 2016, arXiv 1603.09382).

A fixed number of rows goes through the block and the others are not computed, as DINOv2 does it (arXiv 2304.07193,
section 5), so that what is left out costs nothing.

B  rows of the chunk      K  rows that go through the block      L  blocks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def skip_rates(highest: float, number: int) -> list[float]:
    """The share of rows that each of L blocks is left out for: P · l / L, l = 1 … L (Huang et al., section 3).

    Args:
        highest: P, the last block's, from 0 to below 1.
        number: L.
    """
    return [highest * place / number for place in range(1, number + 1)]


def through_some_rows(block: Callable[[Tensor], Tensor], x: Tensor, rate: float) -> Tensor:
    """Map some rows through a block, its residual scaled up so that on average nothing changes; the others stay.

        y_i = x_i + (B / K) (block(x_i) - x_i)  for K rows,  x_i for the others        K = round((1 - rate) · B)

    Args:
        block: maps rows to rows of the same shape, each by itself.
        x: (B, …).
        rate: from 0 to below 1; at least one row goes through.

    Returns:
        (B, …).
    """
    kept = max(1, round((1 - rate) * len(x)))
    if kept == len(x):
        return block(x)
    rows = torch.rand(len(x), device=x.device, dtype=torch.float32).topk(kept).indices
    some = x.index_select(0, rows)
    return x.index_add(0, rows, (block(some) - some).to(x.dtype), alpha=len(x) / kept)
