"""The towers of a CLIP as encoders to be joined with others: of this package's checkpoints, or of any file it reads.

CLIP's text tower by itself, as an encoder to be joined with another image encoder.

B  captions      L  tokens      D  embedding width
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train_clip.checkpoints.found import Choices
from train_clip.checkpoints.weights import fill, find_weights, require_no_prompts
from train_clip.encoders.encoder import ImageEncoder, TextEncoder
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict


class TextTower(nn.Module):
    """The part of a CLIP that embeds captions.

    Args:
        clip: its image tower, temperature and bias are taken off.
    """

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        clip.visual = nn.Identity()
        clip.register_parameter("logit_scale", None)
        clip.register_parameter("logit_bias", None)
        self.clip = clip

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """Embed captions.

        Args:
            input_ids: (B, L) int64 of CLIP's tokenizer. What follows the end token is never looked at.

        Returns:
            (B, D) float, not normalised.
        """
        return self.clip.encode_text(input_ids)


SOURCE = "train-clip"
IMAGE_TOWER = "visual."
OF_BOTH = ("logit_scale", "logit_bias")


def load_image(name: str) -> ImageEncoder:
    """The image tower of a CLIP, projection included.

    Args:
        name: whatever ``train_clip.load`` takes.

    Raises:
        UserError: as there, or the model is no CLIP.
    """
    description, weights = _read(name)
    encoder = build_image(description)
    own = {key.removeprefix(IMAGE_TOWER): value for key, value in weights.items() if key.startswith(IMAGE_TOWER)}
    fill(encoder.module, own, f"{SOURCE}:{name}")
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
    own = {key: value for key, value in weights.items() if not key.startswith((IMAGE_TOWER, *OF_BOTH))}
    assert isinstance(encoder.module, TextTower)
    fill(encoder.module.clip, own, f"{SOURCE}:{name}")
    return encoder


def build_image(description: dict[str, Any]) -> ImageEncoder:
    """An image tower with random weights."""
    clip = CLIP(config_from_dict(description["config"], description["name"]))
    return ImageEncoder(clip.visual, clip.embed_dim, clip.image_size, clip.config.mean, clip.config.std, description)


def build_text(description: dict[str, Any]) -> TextEncoder:
    """A text tower with random weights."""
    clip = CLIP(config_from_dict(description["config"], description["name"]))
    return TextEncoder(TextTower(clip), clip.embed_dim, clip.context_length, clip.vocab_size, description)


def _read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A description, and the weights of both towers."""
    weights = find_weights(name, Choices())
    require_no_prompts(weights.found, f"{SOURCE}:{name}")
    if weights.config is None:
        raise UserError(
            f"{SOURCE}:{name}: two encoders and no CLIP. Expected a checkpoint of `train-clip train`, or another CLIP; "
            "encoders of other libraries come from there (hf:NAME)."
        )
    config = weights.config
    return {"source": SOURCE, "name": name, "label": config.name, "config": config.to_dict()}, weights.read()
