"""Bytes to normalised floats, on whatever device the images are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train_clip.models.config import MEAN, STD


class PixelNorm(nn.Module):
    """(x / 255 - mean) / std for bytes; floats are taken as already normalised and pass unchanged."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float] = MEAN, std: tuple[float, float, float] = STD) -> None:
        super().__init__()
        # Not persistent: the state dict holds the field's names and nothing else.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) uint8, or float that is normalised already, to the buffers' dtype."""
        if images.is_floating_point():
            return images.to(self.mean.dtype)
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std
