"""Checkpoints that are complete or absent, when to write them, and which to keep.

``last.ckpt`` is the newest state; ``step-00000500.ckpt``, the state after 500 optimizer steps, and ``best.ckpt`` are
further names of such files (hard links, copies where the file system has none). An older file is deleted only once the
new one is safe under all its names. With ``--ema`` the weights' EMA has a ``last.ckpt`` and a ``best.ckpt`` of its own.
"""

import math
import pickle
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning
import torch
from lightning.pytorch import callbacks, plugins, utilities
from typing_extensions import override

from train_clip import files
from train_clip.checkpoints import sources
from train_clip.checkpoints.own import LIGHTNING, MODEL, OF_RUN, RUNNING_MEAN, read_checkpoint
from train_clip.errors import UsageError, UserError, root_cause
from train_clip.gather import largest
from train_clip.training import ema, lightning_internals

LAST, BEST = sources.LAST, sources.BEST
# On small sets the held-out loss rises, as the model grows sure of itself, long before retrieval stops getting better
# (docs/training.md shows such a run).
BY_RECALL = "val/mean_recall"


class AtomicCheckpointIO(plugins.TorchCheckpointIO):
    """Lightning's checkpoints as plain data, written next to the target, synced and renamed; verified when loaded."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            raise UserError(
                f"{path}: checkpoints can only be written to local files. Give a local --output and copy it."
            )
        try:
            # Through a file of Python's own: its errors say what is wrong, such as a full disk.
            with files.replacing(Path(path)) as beside:
                with beside.open("wb") as file:
                    torch.save(checkpoint, file)
                # What cannot be read again is found out now, and not when it is needed.
                # Nothing is mapped: Windows would not rename the file.
                torch.load(beside, weights_only=True, map_location="meta")
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: not written, because it would hold more than plain data, which cannot be loaded without "
                f"running code ({root_cause(error)}). Expected tensors, numbers, text, lists and dicts in the "
                "state_dict of every callback, module and data module."
            ) from error
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot be written ({root_cause(error)}). Earlier checkpoints are intact. Free some space or "
                "allow writing there, and resume from the newest."
            ) from error

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        # Of plain data alone, every byte of it checked; code in a file is never run.
        return read_checkpoint(Path(path), map_location)


class Interval(NamedTuple):
    """How often to save: one of the two."""

    steps: int = 0  # optimizer steps
    seconds: float = 0.0  # of wall-clock time

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``500`` (optimizer steps) or ``10m`` (minutes); anything else is a ``UserError``."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m|min|minutes?|steps?|)", text.strip())
        number, unit = (float(found[1]), found[2]) if found else (0.0, "")
        minutes = unit.startswith("m")
        if number <= 0 or not (minutes or number.is_integer()):
            raise UsageError(f"--save_every {text}: expected optimizer steps, such as 500, or minutes, such as 10m.")
        return cls(seconds=60 * number) if minutes else cls(int(number))


class Checkpoints(callbacks.Checkpoint):
    """Saves after each epoch and at an interval within it, and names the checkpoint that scores best.

    Args:
        folder: of the files.
        every: the interval within an epoch; None: only at its end.
        keep: number of the newest checkpoints to keep, besides the best.
        best_by: validation metric, the lowest loss or the highest of any other; the best EMA goes by its own.
        mean_folder: of the EMA's files; default: ``ema`` in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        every: Interval | None = None,
        keep: int = 2,
        best_by: str = BY_RECALL,
        mean_folder: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.mean_folder = mean_folder or self.folder / "ema"
        self.every, self.keep, self.best_by = every or Interval(), keep, best_by
        # Of the best trained weights, and of the best EMA.
        self.best: dict[str, float | None] = {"best": None, "best_mean": None}
        self._due: set[str] = set()  # which of the two are to be saved

    @property
    def mean_is_better(self) -> bool:
        """Whether the best EMA has scored better than the best trained weights."""
        best, best_mean = self.best.values()
        return best is not None and best_mean is not None and self._is_better(best_mean, best)

    @override
    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        # What a crash while saving has left.
        for folder in (self.folder, self.mean_folder) if trainer.is_global_zero else ():
            files.sweep(folder)
        self._saved_at = time.monotonic()

    @override
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if lightning_internals.steps_and_ends(trainer) != (True, False):
            return
        due = self.every.steps > 0 and trainer.global_step % self.every.steps == 0
        if self.every.seconds:
            # One clock decides for all.
            due = largest([int(time.monotonic() - self._saved_at >= self.every.seconds)])[0] > 0
        if due or self._due or trainer.should_stop or trainer.global_step == trainer.max_steps:
            lightning_internals.log_step(trainer)
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        figures, name = trainer.callback_metrics, self.best_by
        if trainer.sanity_checking or not lightning_internals.resuming(trainer) or name not in figures:
            return
        steps, ends_epoch = lightning_internals.steps_and_ends(trainer)
        if not steps and "/" in name and not name.startswith("val/"):
            return  # a figure of other data, which is not this validation's
        if not steps:
            utilities.rank_zero_warn(
                "This validation ran while a gradient was being accumulated, which a checkpoint cannot hold, so it "
                "does not count for best.ckpt. Make --val_check_interval a multiple of --accumulate_grad_batches."
            )
            return
        self.note(figures)
        # Within an epoch it is saved here, else at its end.
        if (self._due or trainer.should_stop) and not ends_epoch:
            self.save(trainer)

    def note(self, figures: Mapping[str, Any]) -> None:
        """Take note of figures: what is better by them than ever is saved as the best, at the next save."""
        for which, figure in (("best", self.best_by), ("best_mean", ema.ema_figure(self.best_by))):
            if figure in figures and self._is_better(value := float(figures[figure]), self.best[which]):
                self.best[which] = value
                self._due.add(which)

    @override
    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        # Not where the run ends within an epoch, which Lightning counts as a whole one from here on.
        if lightning_internals.steps_and_ends(trainer)[1]:
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> Path | None:
        """Save the state of the run, on all processes; None in a trial run (``fast_dev_run``), which leaves nothing.

        Where it cannot be written, all processes raise a ``UserError``, and what was there is as it was.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        # A crash before the other names are given leaves an older last.ckpt, from which this state comes again. Were it
        # last.ckpt already, the run that goes on would know of its best state and not have it.
        target = self.folder / (BEST if "best" in self._due else LAST)
        failure: UserError | None = None
        try:
            # First, for the same reason: the state knows how good the best EMA is.
            self._write_ema(trainer)
            trainer.save_checkpoint(target, weights_only=False)
        except UserError as error:
            failure = error
            # The others, if the fault is this process's alone, wait where ``save_checkpoint`` ends.
            trainer.strategy.barrier()
        if trainer.is_global_zero and failure is None:
            try:
                self._give_names(target, trainer.global_step)
            except OSError as error:
                failure = UserError(f"{error.filename or self.folder}: {error.strerror}. {target} is complete.")
        if largest([int(failure is not None)])[0]:
            raise failure or UserError(f"{target}: the first process could not save it; its message says why.")
        for logger in trainer.loggers:
            logger.save()
        self._due.clear()
        self._saved_at = time.monotonic()
        return self.folder / LAST

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.best | {"best_by": self.best_by}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # By another figure, nothing was best yet.
        if state_dict.get("best_by", self.best_by) == self.best_by:
            self.best = {which: state_dict.get(which) for which in self.best}

    def _is_better(self, value: float, best: float | None) -> bool:
        better = best is None or (value < best if self.best_by.rpartition("/")[2].startswith("loss") else value > best)
        return math.isfinite(value) and better

    def _write_ema(self, trainer: lightning.Trainer) -> None:
        # On all processes: a model whose weights are the EMA's.
        module: Any = trainer.lightning_module
        average = getattr(module, "ema", None)
        if average is None:
            return
        kept = {name: value for name, value in module.state_dict().items() if name.partition(".")[0] not in OF_RUN}
        checkpoint = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            LIGHTNING: lightning.__version__,
            "state_dict": kept | {MODEL + name: value for name, value in average.model.state_dict().items()},
            module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams) | OF_RUN,
            RUNNING_MEAN: {"momentum": average.momentum, "updates": average.num_updates},
        }
        module.on_save_checkpoint(checkpoint)
        if not trainer.is_global_zero:
            return
        last, best = self.mean_folder / LAST, self.mean_folder / BEST
        AtomicCheckpointIO().save_checkpoint(checkpoint, last)
        if "best_mean" in self._due:
            try:
                files.link(last, best)
            except OSError as error:
                raise UserError(f"{best}: {error.strerror}. {last} is complete.") from error

    def _give_names(self, target: Path, step: int) -> None:
        # The other names of a new file; then what is older than the newest few is deleted.
        newest = self.folder / f"step-{step:08}.ckpt"
        for other in (self.folder / LAST, newest):
            if other != target:
                files.link(target, other)
        # Higher numbers are what a run has left that was resumed from before them; they are not this run's to delete.
        steps = [file for file in self.folder.glob(f"step-{'[0-9]' * 8}.ckpt") if file <= newest]
        for file in sorted(steps)[: -self.keep]:
            with suppress(PermissionError):  # Windows, where somebody reads it: the next save tries again
                file.unlink(missing_ok=True)
