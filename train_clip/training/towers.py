"""What a batch holds → embeddings of both sides, by the towers of a model, and everyone's around them.

B  pairs on this process      D  embedding width
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from train_clip.evaluation.embed import unit_norm
from train_clip.gather import gather_with_gradient, world
from train_clip.losses.contrastive import Pairs
from train_clip.models.clip import CLIP
from train_clip.models.dual_encoder import DualEncoder, Texts
from train_clip.training.batch import BatchReader, Inputs
from train_clip.training.chunks import Chunks, encode_in_chunks
from train_clip.training.economy import Economy
from train_clip.training.fixed_texts import FixedTexts
from train_clip.training.stand_ins import StandIns

IMAGE_TOWER, TEXT_TOWER = 0, 1  # tell the towers' random states apart


class TowerRuns:
    """Encodes batches, in the way that a run asks for.

    Args:
        reader: of the batches.
        economy: how a step is computed.
        halves: whether some weights are kept in bfloat16.
        seed: with the count of batches it decides the random state of each chunk.
    """

    def __init__(self, reader: BatchReader, economy: Economy, halves: bool, seed: int) -> None:
        self.reader = reader
        self.economy = economy
        self.halves = halves
        self.seed = seed
        self.fixed_texts = FixedTexts()

    def embed(self, model: DualEncoder, inputs: Inputs, batch: int) -> tuple[Tensor, Tensor]:
        """Embed both sides.

        Args:
            model: whose towers; the one that is trained, or its teacher.
            inputs: what the batch holds.
            batch: global batches before it.

        Returns:
            Two (B, D), unit norm, float32 or wider.
        """
        # A compiled look-up gives no gradient by rows; of CLIP's own towers only the blocks are compiled.
        stand_ins = StandIns(model, self.halves, tables=isinstance(model, CLIP) or not self.economy.compile)
        encode_image, encode_text = stand_ins.around(model.encode_image), stand_ins.around(model.encode_text)

        def embed_texts(texts: Texts, lengths: NDArray[np.int64]) -> Tensor:
            """Map the tokens of b captions to (b, D)."""
            chunks = self._chunks(batch, TEXT_TOWER)
            return unit_norm(encode_in_chunks(encode_text, texts, chunks, model.transformer, lengths))

        if model.text_is_fixed and model is self.reader.model:
            texts = self.fixed_texts.embed(
                inputs.captions, inputs.texts, lambda some: embed_texts(some, self.reader.lengths(some))
            )
        else:
            texts = embed_texts(inputs.texts, inputs.lengths)
        images = encode_in_chunks(encode_image, inputs.images, self._chunks(batch, IMAGE_TOWER), model.visual)
        return unit_norm(images), texts

    def forget(self) -> None:
        """Encode captions of a locked text tower anew: it has other weights."""
        self.fixed_texts = FixedTexts()

    def _chunks(self, batch: int, tower: int) -> Chunks:
        economy = self.economy
        return Chunks(economy.minibatch_size, economy.kept_minibatches, (self.seed, batch, world()[0], tower))


def share(images: Tensor, texts: Tensor, captions: Tensor | None = None) -> Pairs:
    """Gather everyone's embeddings, with gradient, around this process's.

    Args:
        images: (B, D) float, unit norm.
        texts: (B, D) float, unit norm.
        captions: (B,) int64, equal for equal captions.
    """
    all_captions = None if captions is None else gather_with_gradient(captions)
    offset = world()[0] * len(images)
    return Pairs(images, texts, gather_with_gradient(images), gather_with_gradient(texts), offset, all_captions)
