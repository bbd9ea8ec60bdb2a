"""What a run says when it begins and when it has ended: its size and place, and the command that comes next."""

from __future__ import annotations

import shlex
from pathlib import Path

import lightning as L
from torch import nn

from train_clip.commands.resume import Resumption
from train_clip.training.checkpoints import Checkpoints
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.module import ContrastiveModule


def say_start(module: ContrastiveModule, trainer: L.Trainer, folder: Path, resumed: Resumption | None) -> None:
    """Name the model, its size, the device and the run's folder, and what the run goes on from."""
    if trainer.is_global_zero:
        if resumed is not None:
            for reason in resumed.passed_over:
                print(f"Passed over {reason}")
            batches = resumed.state["callbacks"]["EndOfStep"]["consumed_batches"]
            print(f"Resuming from {resumed.checkpoint}, after {resumed.step:,} steps and {batches:,} batches.")
        device, model = trainer.strategy.root_device.type, module.model
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        share = "" if trained >= count(model) else f" ({trained:,} of them trained)"
        print(
            f"{model.name}: {count(model):,} parameters{share}, {model.image_size}×{model.image_size} pixels; "
            f"{trainer.world_size} × {device}, {trainer.precision}. Everything goes to {folder}/."
        )


def say_end(trainer: L.Trainer, folder: Path, data: TextImageDataModule) -> None:
    """Name what the run left, and the command that evaluates it."""
    if not trainer.is_global_zero:
        return
    print(f"Done after {trainer.global_step:,} steps. What the run left is in {folder}/.")
    checkpoints = {file.stem: file for file in (folder / "checkpoints").glob("*.ckpt")}
    if not checkpoints:
        return
    command = ["train-clip", "evaluate", str(checkpoints.get("best", checkpoints["last"]))]
    table = data.val_table or data.table
    command += ["--folder", str(data.folder)] if table is None else ["--pairs", str(table)]
    if table is not None:
        command += _changed_columns(data)
    elif data.pair_by != "stem":
        command += ["--pair_by", data.pair_by]
    if data.validation_pairs:
        if data.val_table is None:
            command += ["--split", "held_out", "--val_share", str(data.val_share)]
        if "val/loss" not in trainer.callback_metrics:
            best = "best.ckpt is as it was before" if "best" in checkpoints else "there is no best.ckpt"
            print(f"No validation was reached, so {best}; --val_check_interval sets how often it comes.")
    print(f"Next: {shlex.join(command)}")
    say_mean(trainer, folder)


def say_mean(trainer: L.Trainer, folder: Path) -> None:
    """Name the running mean's best file, where it has scored better than the weights that were trained."""
    best = folder / "ema" / "best.ckpt"
    for saving in trainer.checkpoint_callbacks:
        if isinstance(saving, Checkpoints) and saving.mean_is_better and best.is_file():
            print(
                f"The running mean of the weights scored better: {saving.best_by.figure} {saving.best_mean:.4f}, the "
                f"trained weights {saving.best:.4f}. Evaluate it by {best} in place of the file above."
            )


def _changed_columns(data: TextImageDataModule) -> list[str]:
    """The options that name a table's columns, where they are not called what they are called by default."""
    named = (("--image_column", "image"), ("--caption_column", "caption"))
    return [
        word
        for option, column in named
        if getattr(data.columns, column) != column
        for word in (option, getattr(data.columns, column))
    ]


def count(module: nn.Module) -> int:
    """All numbers that the module's parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())
