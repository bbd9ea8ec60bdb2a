"""Counts samples that could not be read and captions that were cut, over all processes; says so, and stops a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from train_clip.data.pairs import shown
from train_clip.errors import UserError
from train_clip.gather import gather_objects, host_group, total, world
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.end_of_step import save_now
from train_clip.training.lightning_internals import gradient_pending, last_batch
from train_clip.types import Batch

COUNT_EVERY = 10  # batches between counts over all processes
NAMED_AT_ONCE = 5  # files named on the screen; all of them are in the log


@dataclass
class Counts:
    """What one process has met in an epoch."""

    captions: int = 0
    cut: int = 0
    replaced: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


class SkipReport(L.Callback):
    """Names each bad file once, in ``skipped.tsv`` beside the logs, and prints the counts after each epoch.

    Where more of the data module's pairs turn out to be bad than it allows (``max_bad``), all processes save and stop.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.met: dict[str, str] = {}  # by this process in this fit: an earlier one's files may have been mended
        self.known: dict[str, str] = {}
        self.log_file: Path | None = None
        self._hosts: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle where the log lies, on every process: ``log_dir`` is a broadcast."""
        self.log_file = Path(trainer.log_dir or trainer.default_root_dir) / "skipped.tsv"

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a run that is resumed, know the files that its log names already."""
        assert self.log_file is not None
        if trainer.is_global_zero and self.log_file.is_file():
            lines = self.log_file.read_text(encoding="utf-8").split("\n")
            self.known = dict(line.split("\t", 1) for line in lines if "\t" in line)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the group that counts, on every process."""
        self._hosts = host_group()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Note what the batch carries; now and then look whether it is too much."""
        self._note(batch)
        # An epoch's last batch is looked at together with the validation that follows it.
        due = (batch_idx + 1) % COUNT_EVERY == 0
        if due and not gradient_pending(trainer, batch_idx) and not last_batch(trainer, batch_idx):
            self._stop_if_too_many(trainer, within_epoch=True)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Note what the batch carries; Lightning's trial run before training does not count."""
        if not trainer.sanity_checking:
            self._note(batch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put the processes' counts together and print them, if there is anything to say; stop if it is too much."""
        self._report(trainer, pl_module)
        self._stop_if_too_many(trainer, within_epoch=False)

    def _report(self, trainer: L.Trainer, pl_module: Any) -> None:
        everyone: list[Counts] = gather_objects(self.counts)
        self.counts = Counts()
        if not trainer.is_global_zero:
            return
        for counts in everyone:
            self._log(counts.reasons)
        replaced, cut = sum(counts.replaced for counts in everyone), sum(counts.cut for counts in everyone)
        if replaced:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(self.known.values()).most_common())
            print(
                f"Epoch {trainer.current_epoch + 1}: {replaced:,} samples replaced by others or left out. Bad files so "
                f"far: {len(self.known):,} ({reasons}); their names are in {self.log_file}."
            )
        if cut:
            captions = sum(counts.captions for counts in everyone)
            print(
                f"Epoch {trainer.current_epoch + 1}: {cut:,} of {captions:,} captions were longer than "
                f"{pl_module.tokenizer.context_length} tokens and cut there, end token kept."
            )

    def _stop_if_too_many(self, trainer: L.Trainer, within_epoch: bool) -> None:
        """Stop where more pairs are bad than may be; each bad pair stands in the count by one file, met by whomever."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TextImageDataModule):
            return
        pairs, most = len(data.training_pairs) + len(data.validation_pairs), data.options.max_bad
        # Two processes can meet one file: this sum is only the cheap question.
        if total(len(self.met), self._hosts) <= most * pairs:
            return
        bad: dict[str, str] = {}
        for met in gather_objects(self.met):
            bad |= met
        if len(bad) <= most * pairs:
            return
        if trainer.is_global_zero:
            self._log(bad)
        saved = save_now(trainer, within_epoch)
        reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(bad.values()).most_common())
        raise UserError(
            f"{data.source}: {len(bad):,} of {pairs:,} pairs ({len(bad) / pairs:.1%}) could not be used so far, more "
            f"than --max_bad {most:g} ({reasons}). Their names are in {self.log_file}; `train-clip data check` "
            "finds all there are. Mend or remove them, or allow more by --max_bad."
            + (f" The state of the run is saved in {saved}." if saved else "")
        )

    def _note(self, batch: Any) -> None:
        if not isinstance(batch, Batch):
            return
        self.counts.captions += len(batch.images)
        self.counts.cut += batch.num_cut
        self.counts.replaced += len(batch.skips)
        new = {skip.path: skip.reason for skips in batch.skips for skip in skips}
        self.counts.reasons |= new
        self.met |= new
        if world()[0] == 0:
            self._log(new)

    def _log(self, reasons: dict[str, str]) -> None:
        """Name the files that are not known yet, the first few on the screen and each in the log."""
        new = {shown(path): reason for path, reason in reasons.items() if shown(path) not in self.known}
        for path, reason in new.items():
            self.known[path] = reason
            if len(self.known) <= NAMED_AT_ONCE:
                print(f"Skipped {path}: {reason}.")
        if new:
            assert self.log_file is not None
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("a", encoding="utf-8") as log:
                log.writelines(f"{path}\t{reason}\n" for path, reason in new.items())
