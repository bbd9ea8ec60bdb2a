"""The run's curves as a picture, drawn from ``metrics.csv``."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from train_clip.files import replacing

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
