"""What every model here is: an image tower, a text tower, and one temperature (CLIP paper, figure 3).

B  pairs      L  tokens      S  side of the image in pixels      D  embedding width
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from train_clip.models.config import START_OF_SIGMOID
from train_clip.models.pixels import PixelNorm

MAX_LOGIT_SCALE = 100.0  # CLIP paper, section 2.5

Texts = Tensor | Mapping[str, Tensor]
"""Tokens as a text tower takes them: (B, L) int64, or a tokenizer's mapping of such."""


def token_ids(texts: Texts) -> Tensor:
    """The ids alone: (B, L) int64."""
    return texts["input_ids"] if isinstance(texts, Mapping) else texts


def texts_on(device: torch.device, texts: Texts) -> Texts:
    """The tokens on a device."""
    if isinstance(texts, Mapping):
        return {name: tensor.to(device) for name, tensor in texts.items()}
    return texts.to(device)


class DualEncoder(nn.Module):
    """Two towers that map images and captions into one space.

    Args:
        name: how it is called in messages.
        embed_dim: D.
        image_size: S.
        context_length: tokens of a caption at most; None where it is not known.
        vocab_size: token ids are below it; None likewise.
        initial_scale: what similarities are multiplied by before training, at most 100.
    """

    visual: nn.Module  # the image tower
    transformer: nn.Module  # of the text tower
    pixel_norm: PixelNorm
    least_log_scale: float | None = None
    logit_bias: nn.Parameter | None  # of the sigmoid loss

    def __init__(
        self,
        name: str,
        embed_dim: int,
        image_size: int,
        context_length: int | None,
        vocab_size: int | None,
        initial_scale: float,
    ) -> None:
        super().__init__()
        self.name = name
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.logit_scale = nn.Parameter(torch.tensor(math.log(initial_scale)))
        self.register_parameter("logit_bias", None)
        self._locked: tuple[bool, bool] = (False, False)

    def add_bias(self) -> None:
        """Give logits the bias of the sigmoid loss; bias and temperature are those that it begins with."""
        for name, value in START_OF_SIGMOID.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images: (B, 3, S, S), uint8 or float that is already normalised → (B, D), not normalised."""
        raise NotImplementedError

    def encode_text(self, texts: Texts) -> Tensor:
        """Embed captions: tokens of B captions → (B, D), not normalised."""
        raise NotImplementedError

    def caption_mask(self, texts: Texts) -> Tensor:
        """(B, L) bool: which tokens make up a caption, and which are padding."""
        raise NotImplementedError

    def towers(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the image tower and of the text tower; what joins them is in neither."""
        raise NotImplementedError

    def forward(self, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Score every image against every caption.

        Args:
            images: see ``encode_image``.
            texts: see ``encode_text``.

        Returns:
            Two (B, B) float matrices, logits: scaled cosines, plus the bias where there is one; images by captions, and
            its transpose.
        """
        image_embeddings = nn.functional.normalize(self.encode_image(images), dim=-1)
        text_embeddings = nn.functional.normalize(self.encode_text(texts), dim=-1)
        logits = self.logit_scale.exp() * image_embeddings @ text_embeddings.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def temperature(self) -> list[Tensor]:
        """What turns similarities into logits and is in neither tower: the scale, and the bias where there is one."""
        return [self.logit_scale] if self.logit_bias is None else [self.logit_scale, self.logit_bias]

    @property
    def text_is_fixed(self) -> bool:
        """Whether the text tower is locked, so that a caption's embedding is the same at every step."""
        return self._locked[1]

    def lock(self, image: bool, text: bool) -> None:
        """Keep towers as they are: no gradient, no graph, and eval mode whatever ``train`` asks for."""
        self._locked = (image, text)
        for locked, parameters in zip(self._locked, self.towers(), strict=True):
            for parameter in parameters if locked else ():
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but locked towers."""
        super().train(mode)
        for locked, tower in zip(self._locked, (self.visual, self.transformer), strict=True):
            if locked:
                tower.eval()
        return self

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the scale at or below 100 (CLIP paper, section 2.5). Called after each optimizer step."""
        self.logit_scale.clamp_(self.least_log_scale, math.log(MAX_LOGIT_SCALE))
