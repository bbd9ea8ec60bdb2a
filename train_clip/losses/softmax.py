"""Symmetric cross-entropy between images and captions (CLIP, arXiv 2103.00020, figure 3).

Pure functions of tensors: no rank, no device, no cache. Gathering is the caller's.

B  pairs on this process      N  pairs of the global batch      D  embedding width
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.losses import Loss, Pairs
from train_clip.losses.tiles import TILE, tiled_loss


def clip_loss(pairs: Pairs, scale: Tensor, _bias: Tensor | None = None, mask_equal: bool = False) -> Tensor:
    """The mean of both directions, over this process's rows. Its mean over equal shares is the global batch's loss.

        L = ½ (InfoNCE(images → texts) + InfoNCE(texts → images))

    With ``mask_equal`` the other pairs of an equal caption leave the denominators. () float32, or wider.
    """
    groups = pairs.captions if mask_equal else None
    image_to_text = info_nce(pairs.images, pairs.all_texts, scale, pairs.offset, groups)
    text_to_image = info_nce(pairs.texts, pairs.all_images, scale, pairs.offset, groups)
    return (image_to_text + text_to_image) / 2


def info_nce(rows: Tensor, columns: Tensor, scale: Tensor, offset: int = 0, groups: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row against all columns, its own pair being the right one.

        S = scale · rows columnsᵀ            L = mean over i of CE(S_i, i + offset)

    Args:
        rows: (B, D) float, unit norm: this process's embeddings of one side.
        columns: (N, D) float, unit norm: everyone's embeddings of the other side.
        scale: () float, exp of the learned temperature, at most 100.
        offset: column of this process's first pair.
        groups: (N,) int64: columns equal to a row's own leave its denominator, the own one stays. None for all to stay.
    """
    if len(rows) * len(columns) > TILE:
        return tiled_loss(softmax_tile, (rows, columns, scale, None), offset, groups)
    similarity = scale * rows @ columns.T
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    own = offset + torch.arange(len(rows), device=rows.device)
    if groups is not None:
        others = (groups[own, None] == groups).scatter_(1, own[:, None], False)
        similarity = similarity.masked_fill(others, -torch.inf)
    return F.cross_entropy(similarity, own)


def softmax_tile(logits: Tensor, own: Tensor, wants_gradient: bool) -> Tensor:
    """Cross-entropy of a tile's rows; its gradient is softmax(logits), less 1 at the own pair. See ``TileLoss``."""
    log_share = logits.log_softmax(dim=1)
    loss = -log_share.gather(1, own).sum()
    if wants_gradient:
        torch.exp(log_share, out=logits).scatter_add_(1, own, torch.full_like(own, -1, dtype=logits.dtype))
    return loss


@torch.no_grad()
def loss_floor(groups: Tensor) -> Tensor:
    """The least that ``info_nce`` can be where captions are equal: a row cannot tell its own from those equal to it.

    floor = mean over i of ln n_i            n_i  entries equal to entry i, itself included
    """
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return counts[inverse].float().log().mean()


@torch.no_grad()
def accuracy(rows: Tensor, columns: Tensor, offset: int = 0, groups: Tensor | None = None) -> Tensor:
    """Share of rows, as of ``info_nce``, whose most similar column is their own pair or equal to it: () float32.

    Ties and NaN count against.
    """
    groups = torch.arange(len(columns), device=rows.device) if groups is None else groups
    at_once = max(1, TILE // max(1, len(columns)))
    shares = zip(rows.split(at_once), groups[offset : offset + len(rows), None].split(at_once), strict=True)
    return torch.cat([ranks(some, columns, own == groups) < 1 for some, own in shares]).float().mean()


@torch.no_grad()
def ranks(rows: Tensor, columns: Tensor, right: Tensor) -> Tensor:
    """How many wrong columns stand before each row's best right one. Ties and NaN count against.

    Similarities closer than D · eps are a tie. A computed product of two unit vectors is off by up to D · eps / 2, in
    whatever order its D terms are added (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1);
    and in which order a kernel adds them depends on the processor and on the place in the matrix.

    Args:
        rows: (B, D) float, unit norm.
        columns: (N, D) float, unit norm.
        right: (B, N) bool.

    Returns:
        (B,) int64 in [0, N].
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows.to(dtype) @ columns.to(dtype).T
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    tie = rows.shape[1] * torch.finfo(dtype).eps
    return (~(similarity < best - tie) & ~right).sum(dim=1)


SOFTMAX = Loss(clip_loss, loss_floor)
