"""Encoders that come as modules: what they map to is found by trying.

B  images or captions of the trial      L  tokens of each      S  side of the image in pixels      D  width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from train_clip.encoders.encoder import ImageEncoder, Pixels, TextEncoder, evaluating, image_features, text_features
from train_clip.encoders.huggingface import build_image, build_text, describe_image, describe_text
from train_clip.errors import UserError, first_line

B, L = 2, 4


def live_image_encoder(module: nn.Module, pixels: Pixels) -> ImageEncoder:
    """An image encoder of the user's own, in float32. Only one of Hugging Face's can be described, and built again.

    Args:
        module: maps (B, 3, S, S) normalised images to (B, D), or to a Hugging Face output.
        pixels: what it was trained on.

    Raises:
        UserError: it cannot take such images, or gives something else.
    """
    module.float()
    images = torch.randn(B, 3, pixels.size, pixels.size, generator=torch.Generator().manual_seed(0))
    images = images.to(_device(module))

    def features(encoder: nn.Module) -> Tensor:
        """Of the trial."""
        return image_features(encoder(images))

    found = _trial(module, features, f"images of {pixels.size}×{pixels.size} pixels")
    description = describe_image(module, pixels) or {}
    told = description and _is_told(module, build_image(description).module, features)
    return ImageEncoder(module, found.shape[1], *pixels, description if told else {})


def live_text_encoder(module: nn.Module, average: bool) -> TextEncoder:
    """A text encoder of the user's own, in float32.

    Args:
        module: a Hugging Face text model; or any that takes ``input_ids`` and ``attention_mask`` and gives (B, D).
        average: as for ``CustomCLIP``.

    Raises:
        UserError: it cannot take tokens, or gives something else.
    """
    module.float()
    ids = torch.ones(B, L, dtype=torch.int64, device=_device(module))
    mask = torch.ones_like(ids)

    def features(encoder: nn.Module) -> Tensor:
        """Of the trial."""
        return text_features(encoder(input_ids=ids, attention_mask=mask), mask, average)

    width = _trial(module, features, "input_ids and attention_mask").shape[1]
    description = describe_text(module)
    if description is None:
        return TextEncoder(module, width, None, None, {})
    description["width"] = width
    context, vocab = description["context"], description["vocab"]
    told = _is_told(module, build_text(description).module, features)
    return TextEncoder(module, width, context, vocab, description if told else {})


def _is_told(module: nn.Module, built: nn.Module, features: Callable[[nn.Module], Tensor]) -> bool:
    """Whether a description makes this very module: a layer may have been changed, taken out or added since."""
    built = built.to(_device(module))
    try:
        built.load_state_dict(module.state_dict())
    except RuntimeError:
        return False
    with evaluating(module), evaluating(built):
        return torch.equal(features(built), features(module))


def _trial(module: nn.Module, features: Callable[[nn.Module], Tensor], what: str) -> Tensor:
    """Run an encoder once."""
    with evaluating(module):
        try:
            return features(module)
        except UserError:
            raise
        except Exception as error:
            # A module of any kind raises anything.
            raise UserError(
                f"{type(module).__name__} cannot take {what} ({type(error).__name__}: {first_line(error)}). Expected "
                "an image encoder for images of image_size pixels, and a text encoder for tokens."
            ) from error


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
