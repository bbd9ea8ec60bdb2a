"""Counts unreadable samples and truncated captions over all processes, reports them, and stops a run."""

from collections import Counter
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from typing_extensions import override

from train_clip import errors, gather
from train_clip.data import samples
from train_clip.printing import printable
from train_clip.training import data_module, end_of_step, lightning_internals

COUNT_EVERY = 10  # batches between counts over all processes
NAMED_AT_ONCE = 5  # files named on the screen; all of them are in the log


class SkipReport(Callback):
    """Names each bad file once, in ``skipped.tsv`` beside the logs, and prints the counts after each epoch.

    Where more of the data module's pairs turn out to be bad than it allows (``max_bad``), all processes save and stop.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # by this process in this epoch
        self.met: dict[str, str] = {}  # by this process in this fit: an earlier one's files may have been mended
        self.known: dict[str, str] = {}
        self.num_told, self.told_of_cuts = 0, False  # what would be the same in each epoch is said once

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        # On every process: ``log_dir`` is a broadcast.
        self.log_file = Path(trainer.log_dir or trainer.default_root_dir) / "skipped.tsv"

    @override
    def on_load_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        # A run that is resumed knows the files that its log names already.
        if trainer.is_global_zero and self.log_file.is_file():
            lines = self.log_file.read_text(encoding="utf-8").split("\n")
            self.known = dict(line.split("\t", 1) for line in lines if "\t" in line)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._note(batch)
        # An epoch's last batch is looked at together with the validation that follows it.
        if (batch_idx + 1) % COUNT_EVERY == 0 and lightning_internals.steps_and_ends(trainer) == (True, False):
            self._stop_if_too_many(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        # Lightning's trial run before training does not count.
        if not trainer.sanity_checking:
            self._note(batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        everyone = gather.gather_objects((self.counts, self.met))
        self.counts = Counter()
        if trainer.is_global_zero:
            counts, epoch = Counter[str](), f"Epoch {trainer.current_epoch + 1}"
            for own, met in everyone:
                counts += own
                self._log(met)
            if counts["replaced"] and len(self.known) > self.num_told:
                self.num_told = len(self.known)
                print(
                    f"{epoch}: {counts['replaced']:,} samples replaced by others or skipped. Bad files so far: "
                    f"{len(self.known):,} ({_tally(self.known)}); their names are in {self.log_file}."
                )
            if counts["cut"] and not self.told_of_cuts:
                self.told_of_cuts = True
                print(
                    f"{epoch}: {counts['cut']:,} of {counts['captions']:,} captions were longer than "
                    f"{pl_module.tokenizer.context_length} tokens and were truncated, keeping the end token."
                )
        self._stop_if_too_many(trainer)

    def _stop_if_too_many(self, trainer: Trainer) -> None:
        # Each bad pair stands in the count by one file, met by whichever process.
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, data_module.TextImageDataModule):
            return
        number = len(data.training_pairs) + len(data.validation_pairs)
        allowed = data.options.max_bad * number
        # The cheap question, between the hosts: could it be, with other files on each process?
        if gather.largest([len(self.met)])[0] * gather.world()[1] <= allowed:
            return
        bad = {path: reason for met in gather.gather_objects(self.met) for path, reason in met.items()}
        if len(bad) <= allowed:
            return
        if trainer.is_global_zero:
            self._log(bad)
        saved = end_of_step.save_now(trainer)
        raise errors.UserError(
            f"{data.source}: {len(bad):,} of {number:,} pairs ({len(bad) / number:.1%}) were unusable so far, more "
            f"than --max_bad {data.options.max_bad:g} ({_tally(bad)}). Their names are in {self.log_file}; "
            "`train-clip data check` lists all of them. Fix or remove them, or raise --max_bad. The run is saved in "
            f"{saved or 'no file, because it has no checkpoints'}."
        )

    def _note(self, batch: Any) -> None:
        if isinstance(batch, samples.Batch):
            self.counts.update(captions=len(batch.images), cut=batch.num_cut, replaced=len(batch.skips))
            if new := {skip.path: skip.reason for skips in batch.skips for skip in skips}:
                self.met |= new
                if gather.world()[0] == 0:
                    self._log(new)

    def _log(self, reasons: dict[str, str]) -> None:
        # Of those that are not known yet the first few on the screen, and each in the log.
        new = {name: reason for path, reason in reasons.items() if (name := printable(path)) not in self.known}
        for name, reason in new.items():
            self.known[name] = reason
            if len(self.known) <= NAMED_AT_ONCE:
                print(f"Skipped {name}: {reason}.")
        if new:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("a", encoding="utf-8") as log:
                log.writelines(f"{name}\t{reason}\n" for name, reason in new.items())


def _tally(reasons: dict[str, str]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in Counter(reasons.values()).most_common())
