"""CLIP: an image tower, a text tower, and one temperature (CLIP paper, section 2 and figure 3).

B  pairs      L  tokens, at most the context      S  side of the image in pixels      D  embedding width

The text tower's tensors sit at the top level, as in OpenAI's and open_clip's state dicts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from train_clip.models.blocks import LayerNorm, Transformer
from train_clip.models.config import ModelConfig, ResNetConfig
from train_clip.models.pixels import PixelNorm
from train_clip.models.resnet import ModifiedResNet
from train_clip.models.vit import VisionTransformer

INITIAL_TEMPERATURE = 0.07  # CLIP paper, section 2.5
MAX_LOGIT_SCALE = 100.0  # CLIP paper, section 2.5


class CLIP(nn.Module):
    """Two towers that map images and captions into one space.

    Args:
        config: sizes of both towers, for instance ``read_config("ViT-B/32")``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.pixel_norm = PixelNorm()
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
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))
        self._initialize_text()

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, S, S) uint8 in [0, 255], or float that is already normalised.

        Returns:
            (B, D) float, not normalised.
        """
        return self.visual(self.pixel_norm(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed captions. The feature is the output at the end token, the largest id of each row.

        What follows the end token is never looked at (the tower is causal), so rows may be cut after the longest.

        Args:
            tokens: (B, L) int64, start and end token included.

        Returns:
            (B, D) float, not normalised.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x)
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        return self.ln_final(ends) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Score every image against every caption.

        Args:
            images: (B, 3, S, S), see ``encode_image``.
            tokens: (B, L) int64.

        Returns:
            Two (B, B) float matrices, scaled cosines: images by captions, and its transpose.
        """
        image_embeddings = nn.functional.normalize(self.encode_image(images), dim=-1)
        text_embeddings = nn.functional.normalize(self.encode_text(tokens), dim=-1)
        similarity = self.logit_scale.exp() * image_embeddings @ text_embeddings.T
        return similarity, similarity.T

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the scale at or below 100 (CLIP paper, section 2.5). Called after each optimizer step."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

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
