"""Images → squares, all of them or some by chance.

B  images      S  side of the image in pixels      P  patches      K  patches that are kept
"""

from __future__ import annotations

import torch
from torch import Tensor


def cut_patches(images: Tensor, side: int) -> Tensor:
    """Cut images into squares, row by row: a convolution that does not overlap is a product of its squares.

    As a product its weight's gradient is one too; PyTorch's convolution takes many times as long for it on a CPU.

    Args:
        images: (B, 3, S, S).
        side: of a square, in pixels; what is left over at the right and at the bottom is dropped, as by a convolution.

    Returns:
        (B, P, 3 · side²).
    """
    squares = images.unfold(2, side, side).unfold(3, side, side)  # (B, 3, S / side, S / side, side, side)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def choose_patches(squares: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Keep some squares of each image, any of them as likely as any other (FLIP, arXiv 2212.00794, section 3).

    Args:
        squares: (B, P, 3 · side²).
        number: K, from 1 to P.

    Returns:
        The squares (B, K, 3 · side²), and their places (B, K) int64, each in [0, P), in no order.
    """
    chances = torch.rand(squares.shape[:2], device=squares.device, dtype=torch.float32)
    places = chances.topk(number, dim=1, sorted=False).indices
    return squares.gather(1, places.unsqueeze(-1).expand(-1, -1, squares.shape[-1])), places
