"""Weights that were trained with one loss, as a model that is trained with the other begins with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from train_clip.models.config import START_OF_SIGMOID
from train_clip.models.dual_encoder import DualEncoder

BIAS = "logit_bias"


def begun_with(model: DualEncoder, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Add what the sigmoid loss begins with, or leave out the bias, which the softmax loss has not; say which.

    Args:
        model: that is to be trained.
        weights: a state dict, of the model but for the bias.
        source: named in the line.
    """
    begun = dict(weights)
    if model.logit_bias is not None and BIAS not in weights:
        rank_zero_info(
            f"{source}: has no {BIAS}, so that it was not trained with the sigmoid loss. Temperature and bias begin as "
            "from scratch, at a scale of 10 and at -10."
        )
        begun |= {name: torch.tensor(value) for name, value in START_OF_SIGMOID.items()}
    elif model.logit_bias is None and BIAS in weights:
        rank_zero_info(f"{source}: its {BIAS}, of the sigmoid loss, is left out: the softmax loss has none.")
        del begun[BIAS]
    return begun
