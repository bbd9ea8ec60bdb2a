"""Throw-away: what the module asks for under its final names, made of what is there until the other parts follow."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning as L
from torch.optim import Optimizer

from train_clip.models.clip import DualEncoder
from train_clip.models.config import OptimizerConfig
from train_clip.options import TrainingOptions
from train_clip.training import optimizer as old
from train_clip.training.ema import RunningMean as WeightsEMA
from train_clip.training.ema import of_mean as ema_figure
from train_clip.training.tuning import Tuning, require_precision, require_same_arguments

__all__ = [
    "WeightsEMA", "build_optimizer", "ema_figure", "require_precision", "require_same_arguments", "trainer_of",
    "training_options", "tuning_of", "usual_rate",
]  # fmt: skip


def tuning_of(options: TrainingOptions) -> Tuning:
    """The old class."""
    return Tuning(**{name: value for name, value in options.flat().items() if name in Tuning.__dataclass_fields__})


def training_options(tuning: Tuning, economy: Any, warmup_steps: int | None, seed: int) -> TrainingOptions:
    """Of the old classes."""
    groups = dataclasses.asdict(tuning) | dataclasses.asdict(economy)
    return TrainingOptions.of(groups | {"warmup_steps": warmup_steps, "seed": seed})


def _config(options: TrainingOptions) -> OptimizerConfig:
    o = options.optimizer
    return OptimizerConfig(o.learning_rate, tuple(o.betas), o.eps, o.weight_decay, 0, 1)  # type: ignore


def build_optimizer(module: Any, model: DualEncoder, options: TrainingOptions, fused: bool = False) -> Optimizer:
    """As it is going to be."""
    tuning, config = tuning_of(options), _config(options)
    groups = old.parameter_groups(module, config, *old.rates_and_matrices(model, config, tuning))
    return old.build_optimizer(groups, config, tuning, fused, options.step.seed)


def usual_rate(optimizer: Optimizer, peak: float | None) -> float:
    """As it is going to be."""
    groups = optimizer.param_groups
    rate: float = next((group["lr"] for group in groups if group["initial_lr"] == peak), groups[0]["lr"])
    return rate


def trainer_of(module: L.LightningModule) -> Any:
    """The Trainer that a module is attached to, or None, where ``module.trainer`` raises."""
    return module._trainer
