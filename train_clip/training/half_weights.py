"""Towers whose weights are kept in bfloat16 while they train; ``stand_ins.py`` is how they encode then.

Gains and biases, of one dimension, stay float32: they are a thousandth of a tower, and a gain near 1 would move by
1/128 at a time.
"""

from __future__ import annotations

import torch
from torch import nn

from train_clip.models.dual_encoder import DualEncoder
from train_clip.training.tuning import Tuning


def narrow(model: DualEncoder, tuning: Tuning) -> None:
    """Keep in bfloat16 what is trained of the towers that are to be half as wide, rounded to nearest."""
    for tower, which in zip(model.towers(), ("image", "text"), strict=True):
        if tuning.half_weights in (which, "both"):
            for parameter in tower:
                if parameter.requires_grad and parameter.ndim >= 2 and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def widen(model: nn.Module, tuning: Tuning) -> None:
    """Keep them in float32 again, the same numbers."""
    for parameter in model.parameters():
        if tuning.has_half_weights and parameter.dtype == torch.bfloat16:
            parameter.data, parameter.grad = parameter.data.float(), None
