"""A file of any known kind → the model, its preprocessing and its tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

from train_clip.checkpoints.found import Found, find_weights
from train_clip.data.crops import Preprocess
from train_clip.errors import UserError
from train_clip.models.clip import DualEncoder
from train_clip.options import WeightOptions


class Pretrained(NamedTuple):
    """What ``load`` gives."""

    model: DualEncoder  # in eval mode, in float32: ``encode_image``, ``encode_text``, ``logit_scale``
    preprocess: Preprocess  # a picture or its path → (3, S, S) float32, as the model takes it
    tokenizer: Any  # a caption or several → what ``encode_text`` takes


def load(source: str | Path, *, backbone: str | Path | None = None, **choices: Any) -> Pretrained:
    """Load a CLIP, or two encoders that this package has joined, from whatever holds it; no code of a file is run.

    Args:
        source: a file by OpenAI, open_clip, Hugging Face, train-CLIP or this package; a folder with ``config.json`` or
            ``open_clip_config.json``; a name of OpenAI's (``ViT-B/32``); or ``hf-hub:NAME``.
        backbone: of a file of visual prompts, where its backbone lies, if not where it lay.
        choices: ``model_name``, ``activation``, ``image_size``, ``context_length``; mostly none is needed.

    Raises:
        UserError: nothing there, nothing that is known, damaged or hostile, or what has to be chosen.
    """
    try:
        options = WeightOptions(**choices)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return open_weights(find_weights(source, options, backbone))


def open_weights(weights: Found) -> Pretrained:
    """Build the model that weights are of, and fill it."""
    model, tokenizer = weights.build()
    preprocess = Preprocess(model.image_size, model.pixel_norm.mean, model.pixel_norm.std)
    return Pretrained(model, preprocess, tokenizer)
