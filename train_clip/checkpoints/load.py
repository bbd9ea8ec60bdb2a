"""A checkpoint of any known kind → the model, its preprocessing and its tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train_clip.checkpoints.found import Choices
from train_clip.checkpoints.weights import Weights, fill, find_weights
from train_clip.data.crops import Preprocess
from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders.sources import build_custom
from train_clip.encoders.tokenizer import PretrainedTokenizer
from train_clip.models.clip import CLIP, DualEncoder, PixelNorm
from train_clip.prompts.file import LEFT_OUT
from train_clip.prompts.model import add_prompts


class Pretrained(NamedTuple):
    """What ``load`` gives.

    Args:
        model: in eval mode, in float32: ``encode_image``, ``encode_text``, ``logit_scale``.
        preprocess: a picture or its path → (3, S, S) float32, as the model takes it.
        tokenizer: a caption or several → what ``encode_text`` takes.
    """

    model: DualEncoder
    preprocess: Preprocess
    tokenizer: Tokenizer | PretrainedTokenizer


def load(source: str | Path, **choices: Any) -> Pretrained:
    """Load a CLIP, or two encoders that this package has joined, from whatever holds it; no code of a file is run.

    Args:
        source: a file by OpenAI, open_clip, Hugging Face, train-CLIP or this package; a folder with ``config.json`` or
            ``open_clip_config.json``; a name of OpenAI's (``ViT-B/32``); or ``hf-hub:NAME``.
        choices: see ``Choices``; mostly none is needed.

    Raises:
        UserError: nothing there, nothing that is known, damaged or hostile, or what has to be chosen.
    """
    return open_weights(find_weights(source, Choices(**choices)))


def open_weights(weights: Weights) -> Pretrained:
    """Build the model that weights are of, and fill it.

    Raises:
        UserError: as ``load``.
    """
    if weights.config is not None and weights.config.text.vocab < Tokenizer.vocab_size:
        warnings.warn(
            f"{weights.source}: its vocabulary of {weights.config.text.vocab:,} tokens is not CLIP's. The tokenizer "
            "that comes with it here is, and does not belong to it.",
            stacklevel=3,
        )
    if unused := weights.found.about.get(LEFT_OUT):
        warnings.warn(f"{weights.source}: left out {unused}, which were never used.", stacklevel=3)
    model, tokenizer = build(weights)
    fill(model, weights.read(), weights.source)
    return Pretrained(
        model.eval(), Preprocess(model.image_size, model.pixel_norm.mean, model.pixel_norm.std), tokenizer
    )


def build(weights: Weights) -> tuple[DualEncoder, Tokenizer | PretrainedTokenizer]:
    """Build the model, its weights still to be filled in, and its tokenizer."""
    config = weights.config
    if config is None:
        return build_custom(weights.found.arguments)
    # Without memory for weights that are replaced at once, and the seconds that it takes to draw them.
    with torch.device("meta"):
        model = CLIP(config)
        if weights.found.prompts is not None:
            add_prompts(model, weights.found.prompts)
    model.pixel_norm = PixelNorm(config.mean, config.std)
    return model, Tokenizer(config.text.context)
