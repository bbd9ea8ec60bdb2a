"""A yes or no for each image with each caption: do they belong together (SigLIP, arXiv 2303.15343, section 3.2).

Pure functions of tensors: no rank, no device, no cache. Gathering is the caller's. Since no sum runs over a row or a
column by itself, one direction is both. It is taken in tiles, the gradient in the same pass, as in ``tiles.py``.

B  pairs on this rank      N  pairs in the global batch      D  embedding width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train_clip.losses.softmax import Pairs
from train_clip.losses.tiles import tiles


def sigmoid_loss(pairs: Pairs, scale: Tensor, bias: Tensor, mask_equal: bool = False) -> Tensor:
    """The loss of this rank's images with everyone's texts. Its mean over equal ranks is the global batch's loss.

        S = scale · images textsᵀ + bias            L = -mean over i of Σ_j ln σ(z_ij S_ij)

    with z = 1 for the own pair and -1 for every other.

    Args:
        pairs: see ``Pairs``.
        scale: () float, exp of the learned temperature.
        bias: () float, learned too.
        mask_equal: leave the other pairs of an equal caption out of the sum.

    Returns:
        () float32, or wider where the inputs are. Its gradient cannot be differentiated again.
    """
    groups = pairs.captions if mask_equal else None
    inputs = (pairs.images, pairs.all_texts, scale, bias)
    if not torch.is_grad_enabled():
        inputs = tuple(tensor.detach() for tensor in inputs)  # type: ignore[assignment]
    with torch.autocast(scale.device.type, enabled=False):
        loss: Tensor = _Sigmoid.apply(*inputs, pairs.offset, groups)
    return loss


@torch.no_grad()
def sigmoid_floor(groups: Tensor) -> Tensor:
    """The least that the loss can be where captions are equal: one logit s then stands for one yes and n - 1 noes.

        floor = mean over i of min over s of -ln σ(s) - (n_i - 1) ln σ(-s)
              = mean over i of ln n_i + (n_i - 1) ln(1 + 1 / (n_i - 1))       n_i  entries equal to entry i, itself too

    Args:
        groups: (N,) int64, equal for equal captions.

    Returns:
        () float32; 0 where all are different.
    """
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    others = counts[inverse].float() - 1
    # At σ(s) = 1 / n. Where there are no others, 0 · ln(1 + ∞) is 0.
    return (torch.log1p(others) + torch.special.xlog1py(others, 1 / others)).mean()


class _Sigmoid(torch.autograd.Function):
    """Loss and gradient in one pass over tiles of rows.

    L = mean over i of Σ_j ln(1 + exp(-z_ij S_ij))      G = ∂L/∂S = -z σ(-z S) / B

    ∂rows = scale · G columns      ∂columns = scale · Gᵀ rows      ∂scale = Σ rows ∘ G columns      ∂bias = Σ G
    """

    @staticmethod
    def forward(  # noqa: PLR0913, autograd's form
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, groups: Tensor | None
    ) -> Tensor:
        """Return () float32, or wider where the inputs are."""
        wants_gradient = any(ctx.needs_input_grad)
        dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
        wide_rows, wide_columns = rows.to(dtype), columns.to(dtype)
        loss, of_bias, zero = torch.zeros(3, dtype=dtype, device=rows.device).unbind()
        of_rows, of_columns = (torch.zeros_like(side) if wants_gradient else side for side in (wide_rows, wide_columns))
        for tile in tiles(rows, columns):
            own = torch.arange(offset + tile.start, offset + tile.stop, device=rows.device)[:, None]
            logits = ((scale.to(dtype) * wide_rows[tile]) @ wide_columns.T).add_(bias)
            if groups is not None:
                others = (groups[own] == groups).scatter_(1, own, False)
                logits.masked_fill_(others, -torch.inf)
            # The own pair's sign turned, z is -1 everywhere.
            logits.scatter_(1, own, -logits.gather(1, own))
            loss = loss + torch.logaddexp(logits, zero).sum()
            if wants_gradient:
                gradient = logits.sigmoid_()
                gradient.scatter_(1, own, -gradient.gather(1, own))
                of_bias = of_bias + gradient.sum()
                torch.mm(gradient, wide_columns, out=of_rows[tile])
                of_columns.addmm_(gradient.T, wide_rows[tile])
        if wants_gradient:
            of_scale = (wide_rows * of_rows).sum() / len(rows)
            of_rows.mul_(scale / len(rows))
            of_columns.mul_(scale / len(rows))
            parts = zip((of_rows, of_columns, of_scale, of_bias / len(rows)), (rows, columns, scale, bias), strict=True)
            ctx.save_for_backward(*(part.to(tensor.dtype) for part, tensor in parts))
        return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient that the forward pass took."""
        return *(upstream.to(part.dtype) * part for part in ctx.saved_tensors), None, None
