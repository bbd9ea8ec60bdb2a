"""Lightning's Trainer of a run, with this package's callbacks, loggers and writer of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from train_clip.commands.options import TrainerOptions
from train_clip.errors import UserError
from train_clip.training.checkpoint_io import AtomicCheckpointIO
from train_clip.training.checkpoints import Checkpoints
from train_clip.training.curves import Curves
from train_clip.training.metrics_log import MetricsLog
from train_clip.training.progress import RunProgress
from train_clip.training.throughput import Throughput


def resolve_trainer(options: TrainerOptions) -> dict[str, Any]:
    """Fill in the default that differs from Lightning's: precision by device."""
    resolved = dict(options)
    if resolved.get("precision") is None:
        resolved["precision"] = default_precision(resolved.get("accelerator", "auto"))
    return resolved


def default_precision(accelerator: Any) -> str:
    """bf16-mixed where the GPU has it, otherwise 16-mixed; float32 without a CUDA device."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def build_trainer(
    options: dict[str, Any], folder: Path, epochs: int, saving: Checkpoints, first_step: int = 0
) -> L.Trainer:
    """Make Lightning's Trainer with this package's callbacks beside the user's.

    Args:
        options: the Trainer's arguments as plain values, resolved.
        folder: the run's.
        epochs: passes over the data.
        saving: when to save, and what to keep.
        first_step: optimizer steps that a run which is resumed has done.

    Raises:
        UserError: options that do not go together, or that need what is not there.
    """
    made = {name: _instantiate(value) for name, value in options.items()}
    callbacks: list[L.Callback] = [Throughput(), Curves(folder / "curves.png")]
    if made.get("enable_progress_bar") is not False:
        callbacks.append(RunProgress())
    if made.get("enable_checkpointing") is not False:
        callbacks.append(saving)
    own = made.get("callbacks") or []
    made["callbacks"] = callbacks + (own if isinstance(own, list) else [own])
    plugins = made.get("plugins") or []
    made["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
    made["logger"] = _loggers(made.get("logger"), folder, first_step)
    if made.get("enable_model_summary") is None:
        made["enable_model_summary"] = False
    try:
        return L.Trainer(**made, max_epochs=epochs, default_root_dir=folder)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"Lightning's Trainer refuses these options: {error}") from error


def _loggers(asked: Any, folder: Path, first_step: int) -> list[Logger] | bool:
    """CSV always, for the curves; TensorBoard where the user names no other logger; none for ``--logger false``."""
    if asked is False:
        return False
    csv = MetricsLog(folder, first_step)
    if asked in (None, True):
        return [csv, TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_step or None)]
    return [csv, *(asked if isinstance(asked, list) else [asked])]


def _instantiate(value: Any) -> Any:
    """Turn ``{class_path, init_args}`` into an object, also within a list; leave the rest as it is."""
    if isinstance(value, list):
        return [_instantiate(item) for item in value]
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    try:
        return instantiate_class((), value)
    except ImportError as error:
        raise UserError(f"{value['class_path']}: {error}. Install the package that it needs.") from error
