"""The towers of this package's own checkpoints as encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from train_clip.checkpoints.reading import read_checkpoint
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.models.encoders.encoder import ImageEncoder, TextEncoder
from train_clip.models.text_tower import TextTower

SOURCE = "train-clip"


def load_image(name: str) -> ImageEncoder:
    """The image tower of a CLIP, projection included.

    Args:
        name: a checkpoint of ``train``, or of ``finetune --pretrained``.

    Raises:
        UserError: as ``read_checkpoint``, or the model is no CLIP.
    """
    description, weights = _read(name)
    encoder = build_image(description)
    _load(encoder.module, weights, "model.visual.", name)
    return encoder


def load_text(name: str) -> TextEncoder:
    """The text tower of a CLIP, projection included.

    Args:
        name: as for ``load_image``.

    Raises:
        UserError: likewise.
    """
    description, weights = _read(name)
    encoder = build_text(description)
    others = ("model.visual.", "model.logit_scale")
    weights = {key: value for key, value in weights.items() if not key.startswith(others)}
    assert isinstance(encoder.module, TextTower)
    _load(encoder.module.clip, weights, "model.", name)
    return encoder


def build_image(description: dict[str, Any]) -> ImageEncoder:
    """An image tower with random weights."""
    clip = CLIP(config_from_dict(description["config"], description["name"]))
    return ImageEncoder(clip.visual, clip.embed_dim, clip.image_size, clip.config.mean, clip.config.std, description)


def build_text(description: dict[str, Any]) -> TextEncoder:
    """A text tower with random weights."""
    clip = CLIP(config_from_dict(description["config"], description["name"]))
    return TextEncoder(TextTower(clip), clip.embed_dim, clip.context_length, clip.vocab_size, description)


def _read(name: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A description, and the weights under the names that they have in the file."""
    state = read_checkpoint(Path(name))
    arguments = state.get("hyper_parameters", {})
    if not isinstance(arguments, Mapping) or "config" not in arguments:
        raise UserError(
            f"{SOURCE}:{name}: holds no CLIP of ours. Expected a checkpoint of `train-clip train`; encoders of other "
            "libraries come from there (hf:NAME)."
        )
    config = arguments["config"]
    return {"source": SOURCE, "name": name, "label": config["name"], "config": config}, state["state_dict"]


def _load(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, name: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(
            f"{SOURCE}:{name}: the weights do not fit its model ({str(error).splitlines()[-1].strip()})."
        ) from error
