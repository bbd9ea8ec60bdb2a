"""The run's figures as ``metrics.csv``, one file for a run however often it was interrupted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from train_clip.errors import UserError


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
