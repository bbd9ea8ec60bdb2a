"""What a module is to those who do not train it: scores and embeddings of images and captions.

D  embedding width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor

from train_clip.evaluation.embed import EMBED_AT_ONCE, Picture, embed_images, embed_texts
from train_clip.models.dual_encoder import DualEncoder, Texts
from train_clip.training.batch import BatchReader
from train_clip.training.stand_ins import StandIns


class EmbeddingModule(L.LightningModule):
    """Embeds by a model of two towers.

    Args:
        model: both towers and the temperature.
        halves: whether some of its weights are kept in bfloat16 while it trains.
    """

    def __init__(self, model: DualEncoder, halves: bool) -> None:
        super().__init__()
        self.model = model
        self._reader = BatchReader(model, None)
        self._halves = halves

    @property
    def tokenizer(self) -> Any:
        """For captions that are strings: its ``batch`` gives tokens, and the number of captions that were cut."""
        return self._reader.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._reader.tokenizer = tokenizer

    def forward(self, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Score every image against every caption, as ``DualEncoder.forward``."""
        with StandIns(self.model, self._halves).in_place():
            return self.model(images, texts)

    def embed_images(self, images: Picture | Sequence[Picture] | Tensor, batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed images for search and comparison, with the model in eval mode.

        Args:
            images: paths or pictures, one or several, which are resized and centre-cropped; or a tensor (N, 3, S, S),
                uint8 or already normalised.
            batch_size: images at a time.

        Returns:
            (N, D) float32, unit norm, on this module's device. The similarity of an image and a caption is the product
            of their embeddings.

        Raises:
            BadSample: a file that cannot be read as an image.
        """
        with StandIns(self.model, self._halves).in_place():
            return embed_images(self.model, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed captions, with the model in eval mode.

        Args:
            texts: one caption or several; what is over the context length is cut.
            batch_size: captions at a time.

        Returns:
            (N, D) float32, unit norm, on this module's device.
        """
        with StandIns(self.model, self._halves).in_place():
            return embed_texts(self.model, texts, lambda some: self._reader.tokens(some, self.device), batch_size)
