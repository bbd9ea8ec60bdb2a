"""A pretrained encoder with what the rest has to know of it.

S  side of the image in pixels      D  width of the features
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from train_clip.errors import UserError, first_line
from train_clip.models.encoders.outputs import image_features


@dataclass(frozen=True)
class ImageEncoder:
    """Images to features.

    Args:
        module: takes (B, 3, S, S) float, normalised; ``image_features`` reads what it gives.
        width: D.
        size: S.
        mean: of each channel: the module was trained on (x / 255 - mean) / std.
        std: of each channel.
        description: plain data, from which the encoder is rebuilt with random weights and without a network: under
            "source" the library ("hf", "timm", "torchvision"), under "name" what it was asked for, then what the
            library needs. It lies in checkpoints, which are read without executing code.
    """

    module: nn.Module
    width: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    description: dict[str, Any]


@dataclass(frozen=True)
class TextEncoder:
    """Captions to features.

    Args:
        module: called with the tokenizer's tensors by name; ``text_features`` reads what it gives.
        width: D of the average over tokens.
        context: the most tokens that it takes, start and end included; None where that is not known.
        vocab: ids are below it; None likewise.
        description: as ``ImageEncoder``'s.
    """

    module: nn.Module
    width: int
    context: int | None
    vocab: int | None
    description: dict[str, Any]


class Pixels(NamedTuple):
    """What an image encoder was trained on: S, and (x / 255 - mean) / std for each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def measured(module: nn.Module, pixels: Pixels, description: dict[str, Any]) -> ImageEncoder:
    """Complete an image encoder by its width, which one image of zeros tells, and complete its description.

    Args:
        module: the encoder.
        pixels: what it was trained on.
        description: "source", "name" and what the library needs to build the module.

    Raises:
        UserError: the module does not take such an image, gives no features, or other ones each time.
    """
    name = f"{description['source']}:{description['name']}"
    like = next(module.parameters(), torch.zeros(()))
    images = like.new_zeros(1, 3, pixels.size, pixels.size)
    with evaluating(module):
        try:
            outputs = module(images), module(images)
        except Exception as error:
            raise UserError(
                f"{name}: fails on an image of {pixels.size} × {pixels.size} pixels ({first_line(error)}). "
                "Expected an encoder of single images. Take another."
            ) from error
        features, again = map(image_features, outputs)
    if not torch.allclose(features, again, equal_nan=True):
        raise UserError(
            f"{name}: gives other features for the same image each time; expected the same. A masked autoencoder, for "
            "one, hides parts of its input at random. Take another encoder."
        )
    width = features.shape[1]
    described = {**description, "width": width, "size": pixels.size, "mean": [*pixels.mean], "std": [*pixels.std]}
    return ImageEncoder(module, width, *pixels, described)


def rebuilt(module: nn.Module, description: dict[str, Any]) -> ImageEncoder:
    """Join a module that was built from a description with the figures that ``measured`` left there."""
    mean, std = three_channels(description["mean"]), three_channels(description["std"])
    return ImageEncoder(module, description["width"], description["size"], mean, std, description)


def three_channels(values: Sequence[float]) -> tuple[float, float, float]:
    """Give the three figures of a mean or deviation.

    Raises:
        ValueError: not three.
    """
    red, green, blue = (float(value) for value in values)
    return red, green, blue


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode, without gradients, for the length of a block."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:  # one by one: a part may be held in eval mode on purpose
            part.training = True
