"""A pretrained encoder with what the rest needs to know about it, and which of its outputs is the feature.

B  images or captions      C, D  width      L  tokens or patches      H, W  what is left of the image      S  its side
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from train_clip.errors import UserError, first_line
from train_clip.evaluation.embed import evaluating

# Plain data, of which an encoder is rebuilt with random weights and without a network: under "source" the library,
# under "name" what it was asked for, then what the library needs. It lies in checkpoints, which are read without
# executing code. Empty for a module of the user's own that cannot be described.
Description = dict[str, Any]


@dataclass(frozen=True)
class ImageEncoder:
    """Images to features."""

    module: nn.Module  # takes (B, 3, S, S) float, normalized; ``image_features`` reads what it gives
    width: int  # D
    size: int  # S
    mean: tuple[float, ...]  # the module was trained on (x / 255 - mean) / std of each channel
    std: tuple[float, ...]
    description: Description


@dataclass(frozen=True)
class TextEncoder:
    """Captions to features."""

    module: nn.Module  # called with the tokenizer's tensors by name; ``text_features`` reads what it gives
    width: int  # D, of the average over tokens
    context: int | None  # the most tokens that it takes, start and end included; None where that is not known
    vocab: int | None  # ids are below it; None likewise
    description: Description


class Pixels(NamedTuple):
    """What an image encoder was trained on: S, and the mean and deviation of each channel, of pixels in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, size: int, mean: Any, std: Any, names: str = "mean and std", scale: float = 1) -> "Pixels":
        """Take any kinds of numbers, divided by the scale; ``names`` begins the message where they are not three."""
        try:
            both = np.array([mean, std], float).reshape(2, 3) / scale
        except (TypeError, ValueError):
            raise UserError(
                f"{names} are {mean!r} and {std!r}; expected three numbers each: red, green, blue."
            ) from None
        return cls(size, *map(tuple, both.tolist()))


def image_features(output: Any) -> Tensor:
    """Take an image encoder's features, (B, D) float, not normalized.

    Its output is (B, D) or (B, D, 1, 1) float; or an object of Hugging Face's form, of which the first is taken that is
    there: ``image_embeds`` or ``pooler_output``, shaped likewise, or ``last_hidden_state`` as (B, C, H, W), whose mean
    over space, or as (B, L, D), whose first token, the class token, is the feature.
    """
    if (features := _pooled(output, "image", "image_embeds", "pooler_output")) is not None:
        return features
    hidden: Any = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor) and hidden.ndim in (3, 4):
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
    raise UserError(
        f"The image encoder gives {type(output).__name__}; expected a tensor (B, D), or an output like Hugging Face's "
        "with image_embeds, pooler_output or last_hidden_state. Wrap the encoder in a module that returns (B, D)."
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
        (B, D) float, not normalized; of an average in float32 or wider, and zeros for a row without a token.
    """
    names = () if average else ("text_embeds", "pooler_output")
    if (features := _pooled(output, "text", *names)) is not None:
        return features
    if not average:
        raise UserError(
            f"The text encoder gives {type(output).__name__} without text_embeds or pooler_output, one of which is the "
            "feature of a caption. Pass avg_word_embs=True (--avg_word_embs true) for the mean over its tokens."
        )
    hidden: Any = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise UserError(
            f"The text encoder gives {type(output).__name__} without last_hidden_state (B, L, D), whose mean "
            "avg_word_embs=True needs. Use another encoder, or avg_word_embs=False (--avg_word_embs false)."
        )
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return wide.mean(dim=1)
    is_token = attention_mask.bool().unsqueeze(2)
    return wide.masked_fill(~is_token, 0).sum(dim=1) / is_token.sum(dim=1).clamp(min=1)


def _pooled(output: Any, kind: str, *names: str) -> Tensor | None:
    # The output itself, or the first of these tensors that it has, as (B, D).
    held = {"output": output} | {name: getattr(output, name, None) for name in names}
    for what, features in held.items():
        if isinstance(features, Tensor):
            rows = features.flatten(1) if features.shape[2:] == (1, 1) else features
            if rows.ndim == 2:
                return rows
            raise UserError(
                f"The {kind} encoder's {what} has the shape {(*rows.shape,)}; expected (B, D), one row per input. "
                "Remove or replace the head, for instance by global average pooling and nn.Flatten()."
            )
    return None


def measured(module: nn.Module, pixels: Pixels, description: Description) -> ImageEncoder:
    """Complete an image encoder by its width, which a trial tells, and its description by what ``rebuilt`` reads."""
    features = image_trial(module, pixels.size, description)
    width = features.shape[1]
    if description:  # a module of the user's own may give other features for the same image each time
        if not torch.allclose(features, image_trial(module, pixels.size, description), equal_nan=True):
            raise UserError(
                f"{description['source']}:{description['name']}: gives different features for the same image each "
                "time; expected equal ones. A masked autoencoder, for example, hides random parts of its input. Use "
                "another encoder."
            )
        description = {**description, "width": width, "size": pixels.size, "mean": [*pixels.mean], "std": [*pixels.std]}
    return ImageEncoder(module, width, *pixels, description)


def rebuilt(module: nn.Module, description: Description) -> ImageEncoder:
    """Join a module that was built from a description with the figures that ``measured`` left there."""
    pixels = Pixels.of(*(description[key] for key in ("size", "mean", "std")))
    return ImageEncoder(module.eval(), description["width"], *pixels, description)


def image_trial(module: nn.Module, size: int, description: Description) -> Tensor:
    """Give a module's features of two made-up images, the same at each call: (2, D)."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with _trying(module, description, f"an image of {size} × {size} pixels, its image_size") as device:
        return image_features(module(images.to(device)))


def text_trial(module: nn.Module, average: bool, description: Description) -> Tensor:
    """Give a module's features of two captions of four tokens: (2, D)."""
    with _trying(module, description, "input_ids and attention_mask") as device:
        ids = torch.ones(2, 4, dtype=torch.int64, device=device)
        return text_features(module(input_ids=ids, attention_mask=ids), ids, average)


@contextlib.contextmanager
def _trying(module: nn.Module, description: Description, given: str) -> Iterator[torch.device]:
    try:
        with evaluating(module):
            yield next(module.parameters(), torch.empty(0)).device
    except UserError:
        raise
    except Exception as error:  # a module of any kind raises anything
        name = f"{description['source']}:{description['name']}: " if description else ""
        raise UserError(
            f"{name}{type(module).__name__} fails on {given} ({type(error).__name__}: {first_line(error)}). "
            "Expected an encoder for this input. Use another one."
        ) from error
