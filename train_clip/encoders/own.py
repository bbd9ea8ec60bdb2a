"""The towers of a CLIP as encoders to be joined with others: of this package's checkpoints, or of any file it reads.

B  captions      L  tokens      D  embedding width
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train_clip.checkpoints.found import fill, find_weights
from train_clip.encoders.encoder import ImageEncoder, TextEncoder
from train_clip.encoders.sources import OWN
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

IMAGE_TOWER = "visual."
OF_BOTH = ("logit_scale", "logit_bias")


class TextTower(nn.Module):
    """The part of a CLIP that embeds captions: its image tower, temperature and bias are taken off."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        clip.visual = nn.Identity()
        clip.register_parameter("logit_scale", None)
        clip.register_parameter("logit_bias", None)
        self.clip = clip

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """Map (B, L) int64 of CLIP's tokenizer to (B, D) float; what follows the end token is never looked at."""
        return self.clip.encode_text(input_ids)


def load_image(name: str) -> ImageEncoder:
    """Load the image tower, projection included, of a CLIP in whatever ``train_clip.load`` takes."""
    description, weights = _read(name)
    encoder = build_image(description)
    own = {key.removeprefix(IMAGE_TOWER): value for key, value in weights.items() if key.startswith(IMAGE_TOWER)}
    fill(encoder.module, own, f"{OWN}:{name}")
    return encoder


def load_text(name: str) -> TextEncoder:
    """Load the text tower, projection included, of a CLIP in whatever ``train_clip.load`` takes."""
    description, weights = _read(name)
    encoder = build_text(description)
    own = {f"clip.{key}": value for key, value in weights.items() if not key.startswith((IMAGE_TOWER, *OF_BOTH))}
    fill(encoder.module, own, f"{OWN}:{name}")
    return encoder


def build_image(description: dict[str, Any]) -> ImageEncoder:
    """Build an image tower with random weights."""
    clip = CLIP(config_from_dict(description["config"], description["name"]))
    return ImageEncoder(clip.visual, clip.embed_dim, clip.image_size, clip.config.mean, clip.config.std, description)


def build_text(description: dict[str, Any]) -> TextEncoder:
    """Build a text tower with random weights."""
    clip = CLIP(config_from_dict(description["config"], description["name"]))
    return TextEncoder(TextTower(clip), clip.embed_dim, clip.context_length, clip.vocab_size, description)


def _read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = find_weights(name).require_clip(
        " and no CLIP. Expected a checkpoint of `train-clip train`, or another CLIP; encoders of other libraries come "
        "from there (hf:NAME)."
    )
    config = found.config
    return {"source": OWN, "name": name, "label": config.name, "config": config.to_dict()}, found.read()
