"""Positional embeddings for images of another size and captions of another length. Only on request.

L  positions      W  width      G  places of the grid along a side
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.checkpoints.found import Tensors

OF_IMAGES = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
OF_TEXT = "positional_embedding"


def resize_image_positions(tensors: Tensors, side: int) -> Tensors:
    """Interpolate the grid of an image tower's positions, bicubic with antialiasing, as open_clip does (its model.py).

    Args:
        tensors: of a CLIP; the first position, of the class token or the mean, stays.
        side: G of the image size that is asked for.
    """
    return {name: _resize_grid(tensor, side) if name in OF_IMAGES else tensor for name, tensor in tensors.items()}


def resize_text_positions(tensors: Tensors, context: int) -> Tensors:
    """Fewer positions are the first ones; more are interpolated linearly, as open_clip does (its model.py).

    Args:
        tensors: of a CLIP.
        context: L that is asked for.
    """
    return {name: _resize_line(tensor, context) if name == OF_TEXT else tensor for name, tensor in tensors.items()}


def _resize_grid(positions: Tensor, side: int) -> Tensor:
    """Map (1 + G², W) to (1 + side², W)."""
    now = math.isqrt(max(0, len(positions) - 1)) if positions.ndim == 2 else 0
    if now in (0, side) or now**2 + 1 != len(positions):
        return positions  # as they are, or no grid: strict loading says what they are instead
    first, grid = positions[:1], positions[1:]
    square = grid.T.unflatten(1, (now, now))[None]
    resized = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, resized[0].flatten(1).T])


def _resize_line(positions: Tensor, length: int) -> Tensor:
    """Map (L, W) to (length, W)."""
    if positions.ndim != 2 or length <= len(positions):
        return positions[:length] if positions.ndim else positions
    return F.interpolate(positions.T[None], size=length, mode="linear", align_corners=False)[0].T.contiguous()
