"""Symmetric cross-entropy between images and captions (CLIP, arXiv 2103.00020, figure 3).

B  pairs on this process      N  pairs of the global batch      D  embedding width
"""

import torch
from torch import Tensor

from train_clip.losses import Loss, Pairs
from train_clip.losses.tiles import TILE, tiled_loss, tiles


def clip_loss(pairs: Pairs, scale: Tensor, _bias: Tensor | None = None, mask_equal: bool = False) -> Tensor:
    """Mean of both directions over this process's rows, () float32 or wider: ½ (InfoNCE(V → T) + InfoNCE(T → V)).

    With ``mask_equal`` the other pairs of an equal caption leave the denominators.
    """
    groups = pairs.captions if mask_equal else None
    image_to_text = info_nce(pairs.images, pairs.all_texts, scale, pairs.offset, groups)
    text_to_image = info_nce(pairs.texts, pairs.all_images, scale, pairs.offset, groups)
    return (image_to_text + text_to_image) / 2


def info_nce(rows: Tensor, columns: Tensor, scale: Tensor, offset: int = 0, groups: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row against all columns, its own pair being the right one.

        S = scale · rows columnsᵀ            L = mean over i of CE(S_i, i + offset)

    Arguments are those of ``tiled_loss``; without ``groups`` all columns stay.
    """
    if len(rows) * len(columns) > TILE:
        return tiled_loss(softmax_tile, (rows, columns, scale, None), offset, groups)
    similarity = scale * rows @ columns.T
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    own = offset + torch.arange(len(rows), device=rows.device)
    if groups is not None:
        others = (groups[own, None] == groups).scatter_(1, own[:, None], False)
        similarity = similarity.masked_fill(others, -torch.inf)
    return torch.nn.functional.cross_entropy(similarity, own)


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
    """Fraction of rows, as in ``info_nce``, whose most similar column is their own pair or equal to it: () float32.

    Ties and NaN count against.
    """
    groups = torch.arange(len(columns), device=rows.device) if groups is None else groups
    own = groups[offset : offset + len(rows), None]
    found = [ranks(rows[at], columns, own[at] == groups) < 1 for at in tiles(len(rows), len(columns))]
    return torch.cat(found).float().mean()


@torch.no_grad()
def ranks(rows: Tensor, columns: Tensor, right: Tensor) -> Tensor:
    """How many wrong columns stand before each row's best right one. Ties and NaN count against.

    Of (B, D) rows, as few as ``tiles`` gives, and (N, D) columns, unit norm, and (B, N) bool: (B,) int64 in [0, N].
    Similarities closer than
    D · eps are a tie: a computed product is off by up to D · eps / 2 (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 3.1), by the order of its sum, which depends on the processor and the place in the matrix.
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows.to(dtype) @ columns.to(dtype).T
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    tie = rows.shape[1] * torch.finfo(dtype).eps
    return (~(similarity < best - tie) & ~right).sum(dim=1)


SOFTMAX = Loss(clip_loss, loss_floor)
