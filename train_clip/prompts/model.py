"""Visual prompts: learned tokens next to the patches of a frozen vision transformer (VPT, arXiv 2203.12119, section 3).

B  images      L  tokens of a block      P  prompts of a block      W  width      S  side of the image in pixels
"""

import math
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.errors import UserError
from train_clip.models.blocks import run_blocks
from train_clip.models.clip import CLIP
from train_clip.models.vit import VisionTransformer
from train_clip.prompts.file import PromptConfig


def add_prompts(clip: CLIP, config: PromptConfig) -> None:
    """Freeze a CLIP and put prompts into its image tower, a vision transformer; the weights that it has stay."""
    if not isinstance(clip.visual, VisionTransformer):
        raise UserError(
            f"{clip.name}: its image tower is a ResNet, which has no tokens to add prompts to. Expected a vision "
            "transformer, such as ViT-B/32; train-clip finetune --pretrained trains ResNets."
        )
    last = len(clip.visual.transformer.resblocks) - 1
    if config.layers[-1] > last:
        raise UserError(f"Prompts at block {config.layers[-1]}; {clip.name} has the blocks 0 to {last}.")
    clip.requires_grad_(False)
    clip.visual.class_embedding.requires_grad_(config.class_token)
    clip.visual = PromptedTransformer(clip.visual, config)


class PromptedTransformer(nn.Module):
    """A frozen vision transformer, in eval mode from now on, with prompts."""

    def __init__(self, backbone: VisionTransformer, config: PromptConfig) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        width = len(backbone.class_embedding)
        bound = math.sqrt(6 / (3 * backbone.patch**2 + width))  # Xavier's of a patch's projection (VPT's code)
        self.prompts = nn.ParameterDict(
            {
                str(layer): nn.Parameter(torch.empty(config.number, width).uniform_(-bound, bound))
                for layer in config.layers
            }
        )

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) normalized images to (B, D) embeddings."""
        blocks = self.backbone.transformer.resblocks
        layers = [partial(self._layer, number, block) for number, block in enumerate(blocks)]
        x = run_blocks(layers, self.backbone.embed(images), blocks.recompute)
        return self.backbone.ln_post(x[:, 0]) @ self.backbone.proj

    def _layer(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        """Map what a block would take without prompts of its own to what it gives: (B, L, W)."""
        if str(number) in self.prompts:
            # After the class token, in place of earlier ones where there are some.
            prompts = self.dropout(self.prompts[str(number)].to(x.dtype).expand(len(x), -1, -1))
            patches = x[:, 1:] if number == self.config.layers[0] else x[:, 1 + self.config.number :]
            x = torch.cat([x[:, :1], prompts, patches], dim=1)
        return block(x)
