"""A model of a file → the module that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_clip.checkpoints.found import Found, FoundCLIP
from train_clip.encoders.wrapper import CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.prompts.wrapper import PromptCLIPWrapper
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.module import ContrastiveModule


def retrained(weights: Found, **how: Any) -> ContrastiveModule:
    """A model of any source in a module that trains it in its own way; an optimizer's state is left behind.

    Args:
        weights: what ``find_weights`` gave.
        how: arguments of the module besides those that say what model it is.

    Raises:
        UserError: tensors that do not fit, or an encoder that the file does not say how to make.
    """
    module: ContrastiveModule
    if isinstance(weights, FoundCLIP):
        config = weights.require_clip().config
        module = CLIPWrapper(config.name, config, **how)
    else:
        module = _alike(weights.arguments, weights.source, how)
    module.begin_with(weights.read(), weights.source)
    return module


def rebuilt(state: Mapping[str, Any], path: Path, **how: Any) -> ContrastiveModule:
    """The module of a run that goes on, before its weights are loaded.

    Args:
        state: what the checkpoint holds besides tensors.
        path: named in messages.
        how: as for ``retrained``.
    """
    return _alike(state.get("hyper_parameters", {}), str(path), how)


def _alike(arguments: Mapping[str, Any], source: str, how: Mapping[str, Any]) -> ContrastiveModule:
    """A module of the model that these arguments tell of."""
    with _naming(source):
        kind = _kind_of(arguments)
        return kind(**{name: arguments[name] for name in kind.names_of_model}, **how)


def _kind_of(arguments: Mapping[str, Any]) -> type[CLIPWrapper] | type[CustomCLIPWrapper] | type[PromptCLIPWrapper]:
    """Which module was made by these arguments."""
    if {"backbone", "prompts"} <= set(arguments):
        return PromptCLIPWrapper
    return CustomCLIPWrapper if "text_encoder" in arguments else CLIPWrapper


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what a foreign or damaged file raises, which may be anything, into a message that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{path}: cannot be loaded ({reason}). Expected a checkpoint that this version of train-clip wrote."
        ) from error
