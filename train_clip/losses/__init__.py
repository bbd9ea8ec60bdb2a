"""Losses: pure functions of tensors. ``options.LOSSES`` names them, each a ``Loss`` in a file of its own."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """This process's B pairs among everyone's N. On one process its share is the whole, and the offset 0."""

    images: Tensor  # (B, D) float, unit norm: this process's
    texts: Tensor  # (B, D) float, unit norm: this process's
    all_images: Tensor  # (N, D) float, unit norm: everyone's, this process's at ``offset`` and after
    all_texts: Tensor  # (N, D) float, unit norm: likewise
    offset: int = 0  # row of this process's first pair
    captions: Tensor | None = None  # (N,) int64, equal for equal captions; None where that is not known


class Loss(NamedTuple):
    """A loss and its smallest possible value."""

    # pairs, () scale, () bias or None, whether equal captions leave the loss → () float32 or wider
    of: Callable[[Pairs, Tensor, Tensor | None, bool], Tensor]
    # (N,) int64, equal for equal captions → () float32, the least that it can be where none leave it
    floor: Callable[[Tensor], Tensor]
