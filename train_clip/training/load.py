"""A checkpoint of any kind that this package writes → the module that was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_clip.checkpoints.reading import read_checkpoint
from train_clip.errors import UserError
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.custom_wrapper import CustomCLIPWrapper
from train_clip.training.module import ContrastiveModule


def load_module(path: Path, device: str = "cpu") -> ContrastiveModule:
    """Load a checkpoint to embed with.

    Args:
        path: of ``train`` or ``finetune``.
        device: what PyTorch calls it.

    Raises:
        UserError: there is no such file, or it is damaged, holds code, or is no such checkpoint.
    """
    return module_of(read_checkpoint(path), path).to(device)


def module_of(state: Mapping[str, Any], path: Path) -> ContrastiveModule:
    """The module whose state a checkpoint holds, its weights strictly loaded.

    Args:
        state: what ``read_checkpoint`` gave.
        path: named in messages.

    Raises:
        UserError: it is no such checkpoint.
    """
    with _naming(path):
        module = kind_of(state["hyper_parameters"])(**state["hyper_parameters"])
        module.load_state_dict(state["state_dict"])
        return module


def retrained(path: Path, **how: Any) -> ContrastiveModule:
    """The model of a checkpoint in a module that trains it in another way; its optimizer's state is left behind.

    Args:
        path: of ``train`` or ``finetune``.
        how: arguments of the module besides those that say what model it is.

    Raises:
        UserError: as ``load_module``.
    """
    state = read_checkpoint(path)
    module = rebuilt(state, path, **how)
    with _naming(path):
        weights = state["state_dict"].items()
        module.begin_with({name.removeprefix("model."): value for name, value in weights if name.startswith("model.")})
        return module


def rebuilt(state: Mapping[str, Any], path: Path, **how: Any) -> ContrastiveModule:
    """The module of a run that goes on, before its weights are loaded.

    Args:
        state: what the checkpoint holds besides tensors.
        path: named in messages.
        how: as for ``retrained``.
    """
    with _naming(path):
        arguments = state["hyper_parameters"]
        kind = kind_of(arguments)
        return kind(**{name: arguments[name] for name in kind.names_of_model}, **how)


def kind_of(arguments: Mapping[str, Any]) -> type[CLIPWrapper] | type[CustomCLIPWrapper]:
    """Which module was made by these arguments."""
    return CustomCLIPWrapper if "text_encoder" in arguments else CLIPWrapper


@contextmanager
def _naming(path: Path) -> Iterator[None]:
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
