"""Throw-away: what the module asks for under its final names, made of what is there until the other parts follow."""

from __future__ import annotations

import dataclasses
from typing import Any

from train_clip.options import TrainingOptions
from train_clip.training.tuning import Tuning, require_precision, require_same_arguments

__all__ = ["require_precision", "require_same_arguments", "training_options", "tuning_of"]


def tuning_of(options: TrainingOptions) -> Tuning:
    """The old class."""
    return Tuning(**{name: value for name, value in options.flat().items() if name in Tuning.__dataclass_fields__})


def training_options(tuning: Tuning, economy: Any, warmup_steps: int | None, seed: int) -> TrainingOptions:
    """Of the old classes."""
    groups = dataclasses.asdict(tuning) | dataclasses.asdict(economy)
    return TrainingOptions.of(groups | {"warmup_steps": warmup_steps, "seed": seed})
