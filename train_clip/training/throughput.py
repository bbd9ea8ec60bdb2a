"""How fast the run goes."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


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
