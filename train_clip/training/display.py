"""The progress display: one bar over the whole run on a terminal, a line now and then in a file.

How fast the run goes.

The run's curves as a picture, drawn from ``metrics.csv``.

The run's figures as ``metrics.csv``, one file for a run however often it was interrupted.
"""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from train_clip.errors import UserError
from train_clip.files import replacing
from train_clip.training.ema import of_mean


class Throughput(L.Callback):
    """Logs ``train/pairs_per_second``: pairs of the global batch over wall-clock time, since the last reading.

    Time spent in validation is left out.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock where it stands still."""
        self.started = self.started or time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        *_: Any,
    ) -> None:
        """Count, and log on the steps that reach a logger."""
        self.pairs += len(batch[0]) * trainer.world_size
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            elapsed = time.perf_counter() - self.started
            pl_module.log("train/pairs_per_second", self.pairs / elapsed, batch_size=len(batch[0]))
            self.pairs, self.started = 0, time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock."""
        self.pairs, self.started = 0, 0.0


# One panel each: its title, and the logged names with their labels.
PANELS = (
    (
        "loss",
        (
            ("train/loss", "training batch"),
            ("train/distillation_loss", "of it, distillation"),
            ("val/loss", "held out, contrastive"),
            ("val_ema/loss", "likewise, running mean"),
        ),
    ),
    (
        "accuracy within the batch",
        (("train/accuracy_image_to_text", "image → text"), ("train/accuracy_text_to_image", "text → image")),
    ),
    (
        "retrieval, held out",
        (
            ("val/R@1_image_to_text", "R@1 image → text"),
            ("val/R@1_text_to_image", "R@1 text → image"),
            ("val/R@5_image_to_text", "R@5 image → text"),
            ("val/R@5_text_to_image", "R@5 text → image"),
            ("val_ema/R@1_image_to_text", "R@1 image → text, running mean"),
            ("val_ema/R@1_text_to_image", "R@1 text → image, running mean"),
        ),
    ),
    ("learning rate", (("train/learning_rate", ""),)),
)


class Curves(L.Callback):
    """Draws ``curves.png`` at the end of the run and after each validation.

    Args:
        target: the picture.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what there is."""
        if not trainer.sanity_checking:
            self._draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the whole run."""
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, CSVLogger):
                logger.save()
                metrics = Path(logger.log_dir) / "metrics.csv"
                if metrics.is_file():
                    draw_curves(metrics, self.target)


def draw_curves(metrics: Path, target: Path) -> None:
    """Plot a CSV log.

    Args:
        metrics: a ``CSVLogger``'s file: a column ``step``, and one for each logged name.
        target: the PNG to write.
    """
    # Matplotlib takes half a second to import: only where a picture is drawn. The object-oriented interface needs no
    # display and leaves a notebook's figures alone.
    from matplotlib.figure import Figure

    series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    with metrics.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    series[name][0].append(int(row["step"]))
                    series[name][1].append(float(value))
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes: Any = figure.subplots(2, 2)
    for panel, (title, lines) in zip(axes.flat, PANELS, strict=True):
        panel.set_title(title)
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        for name, label in lines:
            if name in series:
                held_out = name.startswith("val")
                panel.plot(*series[name], label=label, marker="." if held_out else None, linewidth=1.2)
        if any(label for _, label in lines) and panel.lines:
            panel.legend()
    with replacing(target) as beside:
        figure.savefig(beside, dpi=110, format="png")


class MetricsLog(CSVLogger):
    """Lightning's ``CSVLogger``, which would delete an earlier file; this one goes on in it.

    Args:
        folder: of the run; the file is ``logs/metrics.csv`` in it.
        first_step: optimizer steps that the run has done. Rows from there on are dropped: they are of steps that were
            lost, and come again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(folder, name="", version="logs", flush_logs_every_n_steps=1)
        self._first_step = first_step
        self._newest: tuple[int | None, frozenset[str]] = (None, frozenset())

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer; the first time it takes over the earlier rows."""
        if self._experiment is not None:
            return self._experiment
        file, aside = (Path(self.log_dir) / name for name in ("metrics.csv", "metrics-before.csv"))
        # Lightning deletes metrics.csv: it is put aside until its rows are safe again, also from a crash in between.
        if file.is_file() and not aside.is_file():
            file.replace(aside)
        writer = super().experiment
        writer.metrics = _rows(aside, self._first_step)
        writer.save()
        aside.unlink(missing_ok=True)
        return writer

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; one that was written just now, ahead of its time (``log_step``), is not written again."""
        newest = (step, frozenset(metrics))
        if newest != self._newest:
            super().log_metrics(metrics, step)
        self._newest = newest

    def save(self) -> None:
        """Write out what there is.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            super().save()
        except OSError as error:
            raise UserError(
                f"{self.log_dir}/metrics.csv: cannot be written ({error.strerror}). Free space, or the permission to "
                "write there, and resume the run."
            ) from error


def _rows(file: Path, before: int) -> list[dict[str, Any]]:
    """The rows of an earlier file up to a step, without their empty cells."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [{name: value for name, value in row.items() if name and value} for row in csv.DictReader(lines)]
    # A crash may have cut the last row short.
    return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < before]


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
