"""Counts samples that could not be read and captions that were cut, and says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L

from train_clip.gather import world
from train_clip.types import Batch

NAMED_AT_ONCE = 5  # files named on the screen; all of them are in the log


class SkipReport(L.Callback):
    """Names each bad file once in ``skipped.tsv`` beside the logs, and prints the counts after each epoch."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}
        self.num_replaced = 0
        self.num_cut = 0
        self.num_captions = 0
        self.log_file: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Settle where the log lies, on every process: ``log_dir`` is a broadcast."""
        folder = trainer.log_dir or trainer.default_root_dir
        rank = world()[0]
        self.log_file = Path(folder) / (f"skipped-rank{rank}.tsv" if rank else "skipped.tsv")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # noqa: ARG002
        """Note what the batch carries."""
        self._note(batch)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # noqa: ARG002
        """Note what the batch carries."""
        self._note(batch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the epoch's counts, if there is anything to say."""
        if self.num_replaced:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(self.seen.values()).most_common())
            print(
                f"Epoch {trainer.current_epoch + 1}: {self.num_replaced:,} samples replaced by others because of "
                f"{len(self.seen):,} bad files ({reasons}); their names are in {self.log_file}."
            )
        if self.num_cut:
            context = pl_module.tokenizer.context_length
            print(
                f"Epoch {trainer.current_epoch + 1}: {self.num_cut:,} of {self.num_captions:,} captions were longer "
                f"than {context} tokens and cut there, end token kept."
            )
        self.num_replaced = self.num_cut = self.num_captions = 0

    def _note(self, batch: Any) -> None:
        if not isinstance(batch, Batch):
            return
        self.num_captions += len(batch.images)
        self.num_cut += batch.num_cut
        self.num_replaced += len(batch.skips)
        for skip in batch.skips:
            if skip.path in self.seen:
                continue
            self.seen[skip.path] = skip.reason
            if len(self.seen) <= NAMED_AT_ONCE:
                print(f"Skipped {skip.path}: {skip.reason}. Another pair takes its place.")
            assert self.log_file is not None
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("a", encoding="utf-8") as log:
                log.write(f"{skip.path}\t{skip.reason}\n")
