"""Encoders that come as modules: what they map to is found by trying.

B  images or captions of the trial      L  tokens of each      S  side of the image in pixels      D  width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from train_clip.errors import UserError
from train_clip.models.encoders.encoder import ImageEncoder, Pixels, TextEncoder, evaluating, first_line
from train_clip.models.encoders.huggingface import describe_image, describe_text
from train_clip.models.encoders.outputs import image_features, text_features

B, L = 2, 4


def live_image_encoder(module: nn.Module, pixels: Pixels) -> ImageEncoder:
    """An image encoder of the user's own. Only one of Hugging Face's has a description, to be built again from.

    Args:
        module: maps (B, 3, S, S) normalised images to (B, D), or to a Hugging Face output.
        pixels: what it was trained on.

    Raises:
        UserError: it cannot take such images, or gives something else.
    """
    images = torch.zeros(B, 3, pixels.size, pixels.size, device=_device(module))
    what = f"images of {pixels.size}×{pixels.size} pixels"
    width = _width(module, lambda: image_features(module(images)), what)
    return ImageEncoder(module, width, *pixels, describe_image(module, pixels) or {})


def live_text_encoder(module: nn.Module, average: bool) -> TextEncoder:
    """A text encoder of the user's own.

    Args:
        module: a Hugging Face text model; or any that takes ``input_ids`` and ``attention_mask`` and gives (B, D).
        average: as for ``CustomCLIP``.

    Raises:
        UserError: it cannot take tokens, or gives something else.
    """
    ids = torch.ones(B, L, dtype=torch.int64, device=_device(module))
    mask = torch.ones_like(ids)
    what = "input_ids and attention_mask"
    width = _width(module, lambda: text_features(module(input_ids=ids, attention_mask=mask), mask, average), what)
    description = describe_text(module)
    if description is None:
        return TextEncoder(module, width, None, None, {})
    description["width"] = width
    return TextEncoder(module, width, description["context"], description["vocab"], description)


def _width(module: nn.Module, run: Callable[[], Tensor], what: str) -> int:
    """Run an encoder once."""
    with evaluating(module):
        try:
            return run().shape[1]
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
