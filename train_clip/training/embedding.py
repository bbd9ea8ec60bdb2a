"""What a module is to those who do not train it: scores and embeddings of images and captions.

N  images or captions      S  side of the image in pixels      D  embedding width
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from train_clip.evaluation.embed import EMBED_AT_ONCE, Picture, embed_images, embed_texts
from train_clip.models.clip import DualEncoder, Texts
from train_clip.training.batch import BatchReader
from train_clip.training.encode import WeightSubstitutes


class EmbeddingModule(L.LightningModule):
    """Embeds by a model of two towers, of which some weights may be kept in bfloat16 while it trains."""

    def __init__(self, model: DualEncoder, has_half_weights: bool) -> None:
        super().__init__()
        self.model = model
        self._reader = BatchReader(model, None)
        self._has_half_weights = has_half_weights

    @property
    def tokenizer(self) -> Any:
        """For captions that are strings: its ``batch`` gives tokens, and the number of captions that were cut."""
        return self._reader.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._reader.tokenizer = tokenizer

    @override
    def forward(self, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Score every image against every caption, as ``DualEncoder.forward``."""
        with self._float32():
            return self.model(images, texts)

    def embed_images(self, images: Picture | Sequence[Picture] | Tensor, batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed images in eval mode, so many at a time, to (N, D) float32, unit norm, on this module's device.

        ``images`` are paths or pictures, one or several, which are resized and centre-cropped, or a tensor
        (N, 3, S, S), uint8 or already normalised. An image's embedding times a caption's is their similarity.
        """
        with self._float32():
            return embed_images(self.model, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed captions likewise, one or several; what is over the context length is cut."""
        with self._float32():
            return embed_texts(self.model, texts, lambda some: self._reader.tokens(some, self.device), batch_size)

    def _float32(self) -> Any:
        return WeightSubstitutes(self.model, self._has_half_weights).in_place()
