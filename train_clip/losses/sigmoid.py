"""Classify for each image and each caption whether they belong together (SigLIP, arXiv 2303.15343, section 3.2).

Since no sum runs over a row or a column by itself, one direction is both.
"""

import torch
from torch import Tensor

from train_clip.losses import Loss, Pairs
from train_clip.losses.tiles import tiled_loss


def sigmoid_loss(pairs: Pairs, scale: Tensor, bias: Tensor | None, mask_equal: bool = False) -> Tensor:
    """The loss of this process's images with everyone's texts, () float32 or wider; to be differentiated once.

        S = scale · images textsᵀ + bias            L = -mean over i of Σ_j ln σ(z_ij S_ij)

    z = 1 for the own pair and -1 for others; with ``mask_equal`` other pairs of an equal caption leave the sum.
    """
    assert bias is not None
    inputs = (pairs.images, pairs.all_texts, scale, bias)
    return tiled_loss(sigmoid_tile, inputs, pairs.offset, pairs.captions if mask_equal else None)


def sigmoid_tile(logits: Tensor, own: Tensor, wants_gradient: bool) -> Tensor:
    """Σ ln(1 + exp(-z S)) of a tile's logits S; its gradient is -z σ(-z S). See ``TileLoss``."""
    # The own pair's sign turned, z is -1 everywhere.
    logits.scatter_(1, own, -logits.gather(1, own))
    loss = torch.logaddexp(logits, logits.new_zeros(())).sum()
    if wants_gradient:
        logits.sigmoid_()
        logits.scatter_(1, own, -logits.gather(1, own))
    return loss


@torch.no_grad()
def sigmoid_floor(groups: Tensor) -> Tensor:
    """The least that the loss can be where captions are equal: one logit s then stands for one yes and n - 1 noes.

    floor = mean over i of min over s of -ln σ(s) - (n_i - 1) ln σ(-s)
          = mean over i of ln n_i + (n_i - 1) ln(1 + 1 / (n_i - 1))       n_i  entries equal to entry i, itself too
    """
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    others = counts[inverse].float() - 1
    # At σ(s) = 1 / n. Where there are no others, 0 · ln(1 + ∞) is 0.
    return (torch.log1p(others) + torch.special.xlog1py(others, 1 / others)).mean()


SIGMOID = Loss(sigmoid_loss, sigmoid_floor)
