"""Losses: pure functions of tensors.

The losses by the names that options have for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from train_clip.losses.sigmoid import sigmoid_floor, sigmoid_loss
from train_clip.losses.softmax import Pairs, clip_loss, loss_floor


class Loss(NamedTuple):
    """A loss and the least that it can be.

    Args:
        of: maps pairs, scale, bias, and whether equal captions are left out, to () float32 or wider. The bias is None
            for a loss that has none.
        floor: maps (N,) int64, equal for equal captions, to the least that it can be where none are left out.
    """

    of: Callable[[Pairs, Tensor, Tensor | None, bool], Tensor]
    floor: Callable[[Tensor], Tensor]


def _softmax(pairs: Pairs, scale: Tensor, _: Tensor | None, mask_equal: bool) -> Tensor:
    return clip_loss(pairs, scale, mask_equal)


def _sigmoid(pairs: Pairs, scale: Tensor, bias: Tensor | None, mask_equal: bool) -> Tensor:
    assert bias is not None
    return sigmoid_loss(pairs, scale, bias, mask_equal)


LOSSES = {"softmax": Loss(_softmax, loss_floor), "sigmoid": Loss(_sigmoid, sigmoid_floor)}
