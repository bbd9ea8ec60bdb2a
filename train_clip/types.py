"""What travels between the parts.

B  pairs on this rank      L  tokens of the longest caption      H, W  image size in pixels
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Skip(NamedTuple):
    """A sample that could not be read, and for which another was drawn."""

    path: str  # the file that was at fault
    reason: str  # the same words for the same fault


class Batch(NamedTuple):
    """One process's share of a global batch. Any other batch that starts with images and texts serves as well."""

    images: Tensor  # (B, 3, H, W) uint8 in [0, 255], or float that is already normalised
    texts: Any  # (B, L) int64 tokens, or whatever the text encoder takes
    skips: tuple[tuple[Skip, ...], ...] = ()  # of each sample that was replaced, the bad files on the way to another
    num_cut: int = 0  # captions that were longer than the text encoder's context
    missing: tuple[int, ...] = ()  # rows that only hold the place of a pair that could not be read (validation)
