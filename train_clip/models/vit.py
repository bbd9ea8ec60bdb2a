"""CLIP's vision transformer (CLIP paper, section 2.4; openai/CLIP, model.py).

B  images      S  side of the image in pixels      P  patches      K  patches kept      W  width      D  embedding width
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.models.blocks import LayerNorm, Transformer, is_plain
from train_clip.models.config import ViTConfig


class VisionTransformer(nn.Module):
    """Patches and a class token, through the blocks; the class token's output is projected."""

    kept_patches: int = 0  # K: patches of each image that are looked at in training, chosen at random; 0 for all

    def __init__(self, config: ViTConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        width, patches, deviation = config.width, (config.size // config.patch) ** 2, config.width**-0.5
        self.patch = config.patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(deviation * torch.randn(width))
        self.positional_embedding = nn.Parameter(deviation * torch.randn(patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, activation, causal=False)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(deviation * torch.randn(width, embed_dim))

    @override
    def forward(self, images: Tensor) -> Tensor:
        # (B, 3, S, S) normalized images → (B, D) embeddings
        return self.ln_post(self.transformer(self.embed(images))[:, 0]) @ self.proj

    def embed(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) normalized images to what the first block takes: (B, 1 + P, W), the class token first.

        In training it may be (B, 1 + K, W): patches that are left out are not embedded (FLIP, arXiv 2212.00794).
        """
        as_product = is_plain(self.conv1, nn.Conv2d)
        if as_product:
            # A convolution that does not overlap is a product of its squares. Of PyTorch's, the weight's gradient takes
            # many times as long on a CPU. Both drop what is left over at the right and at the bottom.
            squares = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)  # (B, 3, …, …, p, p)
            patches = squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B, P, 3 · p²), row by row
        else:
            patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, P, W)
        positions: Tensor = self.positional_embedding
        if self.training and self.kept_patches:
            patches, places = choose_patches(patches, self.kept_patches)
            # Looked up in the parameter's own type, in which the gradients of all images are then added.
            positions = nn.functional.embedding(nn.functional.pad(places + 1, (1, 0)), positions)
        if as_product:
            patches = nn.functional.linear(patches, self.conv1.weight.flatten(1))
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], dim=1) + positions.to(patches.dtype))


def choose_patches(patches: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Keep K of the (B, P, …) patches of each image, any as likely as any other (FLIP, arXiv 2212.00794, section 3).

    Gives (B, K, …) patches, and their places (B, K) int64, each in [0, P), in no order.
    """
    chances = torch.rand(patches.shape[:2], device=patches.device, dtype=torch.float32)
    places = chances.topk(number, dim=1, sorted=False).indices
    return patches.gather(1, places.unsqueeze(-1).expand(-1, -1, patches.shape[-1])), places
