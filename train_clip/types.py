"""What travels between the parts.

B  pairs on this rank      L  tokens of the longest caption      H, W  image size in pixels      D  embedding width
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Skip(NamedTuple):
    """A sample that could not be read, and for which another was drawn.

    Args:
        path: the file that was at fault.
        reason: why, the same words for the same fault.
    """

    path: str
    reason: str


class Batch(NamedTuple):
    """One process's share of a global batch. Any other batch that starts with images and texts serves as well.

    Args:
        images: (B, 3, H, W) uint8 in [0, 255], or float that is already normalised.
        texts: (B, L) int64 tokens, or whatever the text encoder takes.
        skips: the samples that were replaced.
        num_cut: captions that were longer than the text encoder's context.
    """

    images: Tensor
    texts: Any
    skips: tuple[Skip, ...] = ()
    num_cut: int = 0


class ImageTextModel(Protocol):
    """What the evaluation needs of a model."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) images to (B, D) embeddings, not normalised."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Map (B, L) int64 tokens to (B, D) embeddings, not normalised."""
