"""What a training verb begins with: weights of any source, or none; and what a run that goes on began with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from train_clip.checkpoints.sources import openai_name
from train_clip.checkpoints.weights import Weights, find_weights
from train_clip.commands.options import ModelOptions
from train_clip.commands.resume import Resumption
from train_clip.errors import UserError

OPENAI = "openai"
DEFAULT_MODEL = "ViT-B/32"


def pretrained_weights(model: ModelOptions) -> Weights | None:
    """The weights that the options name; None where they name none.

    Raises:
        UserError: as ``find_weights``.
    """
    if model.pretrained is None:
        return None
    if model.pretrained != OPENAI:
        return find_weights(model.pretrained, model.choices)
    name = model.model_name or DEFAULT_MODEL
    if openai_name(name) is None:
        raise UserError(f"--pretrained {OPENAI} --model_name {name}: OpenAI has published no such model.")
    return find_weights(name, dataclasses.replace(model.choices, model_name=None))


def require_same_start(resumed: Resumption, asked: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Refuse another start than the run had: its state holds the model, and what is asked for would go unheard.

    Args:
        resumed: what the run goes on from.
        asked: options of what it starts from, by their names; None for one that was left out.
        known: those that the checkpoint itself tells of, for one that lies in no run; of others nothing may be asked.

    Raises:
        UserError: the run's own ``config.yaml``, or else the checkpoint, has another value.
    """
    config = None if resumed.run is None else resumed.run / "config.yaml"
    in_run = config is not None and config.is_file()
    kept = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config and in_run else known or {}
    for name, value in asked.items():
        was = kept.get(name)
        if value == was or (value is None and not in_run) or (name == "pretrained" and _same_weights(value, was)):
            continue
        raise UserError(
            f"{resumed.checkpoint}: the run began {_with(name, was)}, and is to go on {_with(name, value)}. Leave the "
            "option out, or begin a new run."
        )


def _same_weights(asked: str | None, was: str | None) -> bool:
    """Whether both name one file, or OpenAI's weights, which a run keeps by their model's name."""
    if asked is None or was is None:
        return False
    return Path(asked).resolve() == Path(was).resolve() or (asked == OPENAI and openai_name(was) is not None)


def _with(name: str, value: Any) -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"without --{name}" if value is None else f"with --{name} {shown}"
