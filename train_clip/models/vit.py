"""CLIP's vision transformer (CLIP paper, section 2.4; openai/CLIP, model.py).

B  images      S  side of the image in pixels      P  patches      K  patches that are kept      W  width
D  embedding width

Images → squares, all of them or some by chance.

B  images      S  side of the image in pixels      P  patches      K  patches that are kept
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_clip.models.blocks import LayerNorm, Transformer
from train_clip.models.config import ViTConfig


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


class VisionTransformer(nn.Module):
    """Patches and a class token, through the blocks; the class token's output is projected.

    Args:
        config: its sizes.
        embed_dim: D.
        activation: ``quick_gelu`` or ``gelu``.
    """

    kept_patches: int = 0  # K: patches of each image that are looked at in training, chosen by chance; 0 for all

    def __init__(self, config: ViTConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        width = config.width
        patches = (config.size // config.patch) ** 2
        deviation = width**-0.5
        self.patch = config.patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(deviation * torch.randn(width))
        self.positional_embedding = nn.Parameter(deviation * torch.randn(patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, activation, causal=False)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(deviation * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) normalised images to (B, D) embeddings."""
        return self.features(images) @ self.proj

    def features(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) normalised images to (B, W) features, before the projection."""
        return self.read_out(self.transformer(self.embed(images)))

    def embed(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) normalised images to what the first block takes: (B, 1 + P, W), the class token first.

        In training it may be (B, 1 + K, W): patches that are left out are not embedded (FLIP, arXiv 2212.00794).
        """
        squares = cut_patches(images, self.patch)
        positions: Tensor = self.positional_embedding
        if self.training and self.kept_patches:
            squares, places = choose_patches(squares, self.kept_patches)
            # Looked up in the parameter's own type, in which the gradients of all images are then added.
            positions = F.embedding(F.pad(places + 1, (1, 0)), positions)
        patches = F.linear(squares, self.conv1.weight.flatten(1))
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + positions.to(patches.dtype)
        return self.ln_pre(x)

    def read_out(self, x: Tensor) -> Tensor:
        """Map what the last block gives, (B, L, W), the class token first, to (B, W) features."""
        return self.ln_post(x[:, 0])
