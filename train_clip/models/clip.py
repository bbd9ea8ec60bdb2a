"""CLIP: a ViT or ResNet for images, a causal transformer for captions (CLIP paper, section 2).

B  pairs      L  tokens, at most the context      S  side of the image in pixels      D  embedding width

The text tower's tensors sit at the top level, as in OpenAI's and open_clip's state dicts.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from train_clip.models.blocks import LayerNorm, Transformer
from train_clip.models.config import ModelConfig, ResNetConfig
from train_clip.models.dual_encoder import DualEncoder, Texts
from train_clip.models.pixels import PixelNorm
from train_clip.models.resnet import ModifiedResNet
from train_clip.models.vit import VisionTransformer

INITIAL_TEMPERATURE = 0.07  # CLIP paper, section 2.5


class CLIP(DualEncoder):
    """Two towers that map images and captions into one space.

    Args:
        config: sizes of both towers, for instance ``read_config("ViT-B/32")``.
    """

    config: ModelConfig
    transformer: Transformer

    def __init__(self, config: ModelConfig) -> None:
        text = config.text
        super().__init__(
            config.name, config.embed_dim, config.image.size, text.context, text.vocab, 1 / INITIAL_TEMPERATURE
        )
        self.config = config
        if config.logit_bias:
            self.add_bias()
        self.pixel_norm = PixelNorm(config.mean, config.std)
        self.visual: nn.Module
        if isinstance(config.image, ResNetConfig):
            self.visual = ModifiedResNet(config.image, config.embed_dim)
        else:
            self.visual = VisionTransformer(config.image, config.embed_dim, config.activation)
        self.transformer = Transformer(text.width, text.layers, text.heads, config.activation, causal=True)
        self.token_embedding = nn.Embedding(text.vocab, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.ln_final = LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self._initialize_text()

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, S, S) uint8 in [0, 255], or float that is already normalised.

        Returns:
            (B, D) float, not normalised.
        """
        return self.visual(self.pixel_norm(images))

    def encode_text(self, texts: Texts) -> Tensor:
        """Embed captions. The feature is the output at the end token, the largest id of each row.

        What follows the end token is never looked at (the tower is causal), so rows may be cut after the longest.

        Args:
            texts: (B, L) int64, start and end token included.

        Returns:
            (B, D) float, not normalised.
        """
        tokens = cast(Tensor, texts)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x)
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        return self.ln_final(ends) @ self.text_projection

    def caption_mask(self, texts: Texts) -> Tensor:
        """Up to the end token, the largest id: (B, L) bool."""
        return up_to_end(cast(Tensor, texts))

    def towers(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All of ``visual``, and all the rest but the temperature and the bias."""
        image = list(self.visual.parameters())
        other = {id(parameter) for parameter in (*image, *self.temperature())}
        return image, [parameter for parameter in self.parameters() if id(parameter) not in other]

    def _initialize_text(self) -> None:
        """As openai/CLIP, ``initialize_parameters``; attention biases stay 0, the other biases PyTorch's default."""
        width, layers = self.config.text.width, self.config.text.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.blocks():
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)


def up_to_end(tokens: Tensor) -> Tensor:
    """(B, L) bool: a caption of CLIP's tokens ends at its end token, the largest id."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(dim=1, keepdim=True)
