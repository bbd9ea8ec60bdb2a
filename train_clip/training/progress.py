"""The progress display: one bar over the whole run on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from train_clip.training.running_mean import of_mean

REFRESH_SECONDS = 0.5  # figures are read this often: each reading waits for the device
LINE_SECONDS = 15.0  # between lines where there is no terminal

# What is shown, in this order: label, logged name, format.
FIGURES = (
    ("loss", "train/loss", ".3f"),
    ("distillation", "train/distillation_loss", ".3f"),
    ("i→t", "train/accuracy_image_to_text", ".1%"),
    ("t→i", "train/accuracy_text_to_image", ".1%"),
    ("scale", "train/logit_scale", ".1f"),
    ("lr", "train/learning_rate", ".1e"),
    ("pairs/s", "train/pairs_per_second", ",.0f"),
)
VALIDATION_FIGURES = (
    ("loss", "val/loss", ".3f"),
    ("R@1 i→t", "val/R@1_image_to_text", ".1%"),
    ("R@5 i→t", "val/R@5_image_to_text", ".1%"),
    ("R@1 t→i", "val/R@1_text_to_image", ".1%"),
    ("R@5 t→i", "val/R@5_text_to_image", ".1%"),
)


class RunProgress(ProgressBar):
    """Loss, accuracy within the batch both ways, temperature, learning rate, pairs/s and time left."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.enabled = True
        self.started = self.last_shown = 0.0
        self.done_before = 0

    def disable(self) -> None:
        """Show nothing: Lightning calls this on every process but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Show again."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the display."""
        super().on_train_start(trainer, pl_module)
        self.started = time.perf_counter()
        self.done_before = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self.enabled and self.console.is_terminal:
            # The time left stands before the figures, which a narrow terminal cuts at their end.
            columns = (MofNCompleteColumn(), BarColumn(10), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self.progress.start()
            self.task = self.progress.add_task("", total=_total_batches(trainer), completed=self.done_before)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Advance; read the figures when they are due."""
        super().on_train_batch_end(trainer, pl_module, *rest)
        if not self.enabled:
            return
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        now = time.perf_counter()
        if self.progress is not None:
            self.progress.update(self.task, completed=done)
            if now - self.last_shown > REFRESH_SECONDS:
                self.last_shown = now
                self.progress.update(self.task, description=_figures(trainer, FIGURES))
        elif now - self.last_shown > LINE_SECONDS:
            self.last_shown = now
            total = _total_batches(trainer)
            left = (now - self.started) / max(1, done - self.done_before) * (total - done)
            self._say(f"batch {done:,}/{total:,}  {_figures(trainer, FIGURES)}  {_clock(left)} left")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the figures of the held-out pairs."""
        super().on_validation_end(trainer, pl_module)
        if self.enabled and not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
            self._say(f"{where}, held out:  {_figures(trainer, VALIDATION_FIGURES)}")
            if of_mean("val/loss") in trainer.callback_metrics:
                figures = tuple((label, of_mean(name), form) for label, name, form in VALIDATION_FIGURES)
                self._say(f"{where}, running mean:  {_figures(trainer, figures)}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the display, also after an error."""
        super().teardown(trainer, pl_module, stage)
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_exception(self, *_: Any) -> None:
        """Close the display, so that the message stands alone."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _total_batches(trainer: L.Trainer) -> int:
    """Global batches of the whole run."""
    batches = (
        trainer.num_training_batches * (trainer.max_epochs or 1) if (trainer.max_epochs or 1) > 0 else float("inf")
    )
    if trainer.max_steps > 0:
        batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
    return int(batches) if batches < float("inf") else trainer.max_steps


def _figures(trainer: L.Trainer, figures: tuple[tuple[str, str, str], ...]) -> str:
    known = trainer.callback_metrics
    return "  ".join(f"{label} {known[name].item():{form}}" for label, name, form in figures if name in known)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
