"""A pretrained encoder with what the rest has to know of it.

S  side of the image in pixels      D  width of the features

What an encoder returned → one row of features an image or a caption.

Libraries differ in what an encoder gives: a tensor, or an object that holds several. The rules are here, nowhere else.

B  images or captions      C, D  width      L  tokens or patches      H, W  what is left of the image
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train_clip.errors import UserError, first_line


def image_features(output: Any) -> Tensor:
    """Take an image encoder's features.

    Args:
        output: (B, D) or (B, D, 1, 1) float; or an object of Hugging Face's form, of which the first is taken that is
            there: ``image_embeds`` (B, D), ``pooler_output`` (B, D) or (B, D, 1, 1), ``last_hidden_state`` as
            (B, C, H, W), whose mean over space, or as (B, L, D), whose first token, the class token, is the feature.

    Returns:
        (B, D) float, not normalised.

    Raises:
        UserError: anything else.
    """
    if isinstance(output, Tensor):
        return _rows(output, "The image encoder's output")
    for name in ("image_embeds", "pooler_output"):
        if (features := _tensor(output, name)) is not None:
            return _rows(features, f"The image encoder's {name}")
    hidden = _tensor(output, "last_hidden_state")
    if hidden is not None and hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    if hidden is not None and hidden.ndim == 3:
        return hidden[:, 0]
    raise UserError(
        f"The image encoder gives {_named(output)}; expected a tensor (B, D), or an output of Hugging Face's form with "
        "image_embeds, pooler_output or last_hidden_state. Wrap the encoder in a module that returns (B, D)."
    )


def text_features(output: Any, attention_mask: Tensor | None, average: bool) -> Tensor:
    """Take a text encoder's features.

        average:    f = Σ_l m_l h_l / Σ_l m_l        h = last_hidden_state, m = attention_mask

    The padding is left out, not multiplied by 0, so that nothing it holds can reach the sum.

    Args:
        output: (B, D) float, taken as it is; or an object of Hugging Face's form.
        attention_mask: (B, L) 1 on tokens and 0 on padding, bool or any number; None where all are tokens.
        average: the mean over the tokens; otherwise ``text_embeds`` or ``pooler_output``, the first that is there.

    Returns:
        (B, D) float, not normalised; of an average in float32 or wider, and zeros for a row without a token.

    Raises:
        UserError: an output without what is asked for.
    """
    if isinstance(output, Tensor):
        return _rows(output, "The text encoder's output")
    if average:
        hidden = _tensor(output, "last_hidden_state")
        if hidden is None or hidden.ndim != 3:
            raise UserError(
                f"The text encoder gives {_named(output)} without last_hidden_state (B, L, D), whose mean "
                "avg_word_embs=True asks for. Take another encoder, or avg_word_embs=False (--avg_word_embs false)."
            )
        return _masked_mean(hidden, attention_mask)
    for name in ("text_embeds", "pooler_output"):
        if (features := _tensor(output, name)) is not None:
            return _rows(features, f"The text encoder's {name}")
    raise UserError(
        f"The text encoder gives {_named(output)} without text_embeds or pooler_output, one of which is the feature of "
        "a caption. Pass avg_word_embs=True (--avg_word_embs true) for the mean over its tokens."
    )


def _rows(features: Tensor, what: str) -> Tensor:
    """Check (B, D), and flatten (B, D, 1, 1) to it."""
    if features.ndim == 2:
        return features
    if features.ndim == 4 and features.shape[2:] == (1, 1):
        return features.flatten(1)
    raise UserError(
        f"{what} has the shape {tuple(features.shape)}; expected (B, D), one row an input. "
        "Take the head off or replace it, for instance by global average pooling and nn.Flatten()."
    )


def _masked_mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Average (B, L, D) over the tokens of (B, L), in float32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return wide.mean(dim=1)
    is_token = attention_mask.bool().unsqueeze(2)
    return wide.masked_fill(~is_token, 0).sum(dim=1) / is_token.sum(dim=1).clamp(min=1)


def _tensor(output: Any, name: str) -> Tensor | None:
    value = getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _named(output: Any) -> str:
    """Give the type's name with its article."""
    name = type(output).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


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
