"""What a training verb begins with: weights of any source, or none."""

from __future__ import annotations

import dataclasses

from train_clip.checkpoints.sources import openai_name
from train_clip.checkpoints.weights import Weights, find_weights
from train_clip.commands.options import ModelOptions
from train_clip.errors import UserError

OPENAI = "openai"
DEFAULT_MODEL = "ViT-B/32"


def pretrained_weights(model: ModelOptions) -> Weights | None:
    """The weights that the options name; None where they name none.

    Raises:
        UserError: as ``find_weights``.
    """
    if model.pretrained is None:
        return None
    if model.pretrained != OPENAI:
        return find_weights(model.pretrained, model.choices)
    name = model.model_name or DEFAULT_MODEL
    if openai_name(name) is None:
        raise UserError(f"--pretrained {OPENAI} --model_name {name}: OpenAI has published no such model.")
    return find_weights(name, dataclasses.replace(model.choices, model_name=None))
