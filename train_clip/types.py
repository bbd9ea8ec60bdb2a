"""What travels between the parts.

B  pairs on this rank      L  tokens of the longest caption      H, W  image size in pixels
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        skips: for each sample that was replaced, the files that could not be read on the way to another.
        num_cut: captions that were longer than the text encoder's context.
        missing: rows that only hold the place of a pair that could not be read (validation).
    """

    images: Tensor
    texts: Any
    skips: tuple[tuple[Skip, ...], ...] = ()
    num_cut: int = 0
    missing: tuple[int, ...] = ()
