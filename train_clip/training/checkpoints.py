"""When the state of a run is saved, and what is kept of it.

``last.ckpt`` is the newest state; ``step-00000500.ckpt``, the state after 500 optimizer steps, and ``best.ckpt`` are
further names of such files (hard links, copies where the file system has none). An older file is deleted only once the
new one is safe under all its names. With ``--ema`` the running mean of the weights has files of its own
(``mean_file.py``).

Checkpoints that are whole or absent when written.

The running mean of a run's weights in a file of its own: a model's, which whatever reads checkpoints reads.

``last.ckpt`` is that of the newest state, ``best.ckpt`` the one that has scored best.
"""

from __future__ import annotations

import pickle
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from train_clip.checkpoints.own import LIGHTNING, MODEL, OF_RUN, RUNNING_MEAN, read_checkpoint, root_cause
from train_clip.errors import UserError
from train_clip.files import link, replacing, sweep
from train_clip.gather import host_group, largest
from train_clip.training.ema import of_mean
from train_clip.training.lightning_internals import gradient_pending, last_batch, log_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside the target, synced and renamed; checked before they are loaded."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a local path.

        Args:
            checkpoint: plain data and tensors.
            path: the file's final place.
            storage_options: not used.

        Raises:
            UserError: the path is an address, or cannot be written; a file that was there is as it was.
        """
        if "://" in str(path):
            raise UserError(f"{path}: checkpoints are written to local files only. Give a local --output and copy it.")
        try:
            # Through a file of Python's own: its errors say what is wrong, such as a full disk.
            with replacing(Path(path)) as beside:
                with beside.open("wb") as file:
                    torch.save(checkpoint, file)
                # What cannot be read again is found out now, and not when it is needed.
                torch.load(beside, weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: not written, since it would hold more than plain data, and could not be loaded "
                f"without running code ({root_cause(error)}). Expected tensors, numbers, text, lists and dicts in the "
                "state_dict of every callback, module and data module."
            ) from error
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot be written ({root_cause(error)}). Earlier checkpoints are as they were. Free space or "
                "the permission to write there, and resume from the newest."
            ) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of plain data, every byte of it checked.

        Args:
            path: a local file.
            map_location: as for ``torch.load``.
            weights_only: not used: code in a file is never run.

        Raises:
            UserError: there is no such file, or it is damaged or holds more than plain data.
        """
        return read_checkpoint(Path(path), map_location)


LAST, BEST = "last.ckpt", "best.ckpt"


def write_mean(trainer: L.Trainer, folder: Path, is_best: bool) -> None:
    """Write the mean, whole or not at all; nothing where the run has none. Called on all processes.

    Args:
        trainer: of a ``ContrastiveModule``.
        folder: of the two files.
        is_best: whether it is ``best.ckpt`` too.

    Raises:
        UserError: it cannot be written, or follows a step that was not finite; what was there is as it was.
    """
    module: Any = trainer.lightning_module
    if getattr(module, "ema", None) is None:
        return
    kept = {name: value for name, value in module.state_dict().items() if name.partition(".")[0] not in OF_RUN}
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        LIGHTNING: L.__version__,
        "state_dict": kept | {MODEL + name: value for name, value in module.ema.model.state_dict().items()},
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams) | OF_RUN,
        RUNNING_MEAN: {"momentum": module.ema.momentum, "updates": module.ema.num_updates},
    }
    module.on_save_checkpoint(checkpoint)
    if not trainer.is_global_zero:
        return
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / LAST)
    if is_best:
        try:
            link(folder / LAST, folder / BEST)
        except OSError as error:
            raise UserError(f"{folder / BEST}: {error.strerror}. {folder / LAST} is whole.") from error


class Best(NamedTuple):
    """What the best state is best at.

    Args:
        figure: of a validation.
        lowest: whether the lowest is best.
    """

    figure: str = "val/mean_recall"
    lowest: bool = False


@dataclass(frozen=True)
class Interval:
    """How often to save: one of both.

    Args:
        steps: optimizer steps.
        seconds: of wall-clock time.
    """

    steps: int = 0
    seconds: float = 0.0

    @staticmethod
    def parse(text: str) -> Interval:
        """Read ``500`` (optimizer steps) or ``10m`` (minutes).

        Raises:
            UserError: neither.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m|min|minutes?|steps?|)", text.strip())
        number, unit = (float(found[1]), found[2]) if found else (0.0, "")
        minutes = unit.startswith("m")
        if number <= 0 or not (minutes or number.is_integer()):
            raise UserError(f"--save_every {text}: expected optimizer steps, such as 500, or minutes, such as 10m.")
        return Interval(seconds=60 * number) if minutes else Interval(steps=int(number))


BY_RECALL = Best()


class Checkpoints(Checkpoint):
    """Saves after each epoch, at an interval within it, and names the state that scores best.

    Args:
        folder: of the checkpoints.
        every: how often within an epoch; None for only at its end.
        keep: how many of the newest states to keep, beside the best one.
        best_by: by default the best retrieves best on the held-out pairs, and has not the lowest loss: on small sets
            the held-out loss rises, as the model grows sure of itself, long before retrieval stops getting better
            (docs/training.md shows such a run). The best running mean of the weights is best at its own.
        mean_folder: of the running mean; ``ema`` below the folder where None.
    """

    def __init__(
        self,
        folder: str | Path,
        every: Interval | None = None,
        keep: int = 2,
        best_by: Best = BY_RECALL,
        mean_folder: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.mean_folder = mean_folder or self.folder / "ema"
        self.every = every or Interval()
        self.keep = keep
        self.best_by = best_by
        self.best: float | None = None
        self.best_mean: float | None = None
        self._best_is_due = self._best_mean_is_due = False
        self._between_steps = True  # no gradient is pending
        self._epoch_is_whole = False
        self._saved_at = 0.0
        self._hosts: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove what a crash while saving has left."""
        if trainer.is_global_zero:
            sweep(self.folder)
            sweep(self.mean_folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._hosts, self._saved_at = host_group(), time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where the interval is over, or the run ends within an epoch; the end of an epoch saves by itself."""
        self._between_steps = not gradient_pending(trainer, batch_idx)
        self._epoch_is_whole = last_batch(trainer, batch_idx)
        if not self._between_steps or self._epoch_is_whole:
            return
        due = self.every.steps > 0 and trainer.global_step % self.every.steps == 0
        if self.every.seconds:
            # One clock decides for all.
            due = largest([int(time.monotonic() - self._saved_at >= self.every.seconds)], self._hosts)[0] > 0
        if due or trainer.should_stop or trainer.global_step == trainer.max_steps:
            log_step(trainer)
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note a state or a mean that is better than any before; within an epoch it is saved here, else at its end."""
        value = trainer.callback_metrics.get(self.best_by.figure)
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or value is None:
            return
        if not self._between_steps:
            rank_zero_warn(
                "This validation came while a gradient was pending, which no checkpoint can hold: it is not asked for "
                "the best. Make --val_check_interval a multiple of --accumulate_grad_batches."
            )
            return
        if self._is_better(value, self.best):
            self.best, self._best_is_due = float(value), True
        mean = trainer.callback_metrics.get(of_mean(self.best_by.figure))
        if mean is not None and self._is_better(mean, self.best_mean):
            self.best_mean, self._best_mean_is_due = float(mean), True
        due = self._best_is_due or self._best_mean_is_due or trainer.should_stop
        if due and not self._epoch_is_whole:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; not where the run ends within an epoch, which Lightning counts as a whole one from here on."""
        if self._epoch_is_whole:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> Path | None:
        """Save the state of the run, on all processes; the logs are written out with it.

        Returns:
            Where; None in a trial run (``fast_dev_run``), which leaves nothing.

        Raises:
            UserError: it cannot be written, on all processes; what was there is as it was.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        # A crash before the other names are given leaves an older last.ckpt, from which this state comes again. Were it
        # last.ckpt already, the run that goes on would know of its best state and not have it.
        target = self.folder / (BEST if self._best_is_due else LAST)
        failure: UserError | None = None
        try:
            # First, for the same reason: the state knows how good the best mean is.
            write_mean(trainer, self.mean_folder, self._best_mean_is_due)
            trainer.save_checkpoint(target, weights_only=False)
        except UserError as error:
            failure = error
            # The others, if the fault is this process's alone, wait where ``save_checkpoint`` ends.
            trainer.strategy.barrier()
        if trainer.is_global_zero and failure is None:
            try:
                self._name(target, trainer.global_step)
            except OSError as error:
                failure = UserError(f"{error.filename or self.folder}: {error.strerror}. {target} is whole.")
        if largest([int(failure is not None)], self._hosts)[0]:
            raise failure or UserError(f"{target}: the first process could not save it; its message says why.")
        for logger in trainer.loggers:
            logger.save()
        self._best_is_due = self._best_mean_is_due = False
        self._saved_at = time.monotonic()
        return self.folder / LAST

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_mean": self.best_mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.best_mean = state_dict["best"], state_dict.get("best_mean")

    @property
    def mean_is_better(self) -> bool:
        """Whether the best running mean has scored better than the best trained weights."""
        if self.best is None or self.best_mean is None:
            return False
        return self._improves(self.best_mean, self.best)

    def _is_better(self, value: Tensor, best: float | None) -> bool:
        return bool(value.isfinite()) and (best is None or self._improves(float(value), best))

    def _improves(self, value: float, best: float) -> bool:
        return value < best if self.best_by.lowest else value > best

    def _name(self, target: Path, step: int) -> None:
        """Give a new file its other names, and delete what is older than the newest few."""
        for name in (LAST, f"step-{step:08}.ckpt"):
            if name != target.name:
                link(target, self.folder / name)
        found = ((re.fullmatch(r"step-(\d{8,})\.ckpt", file.name), file) for file in self.folder.iterdir())
        numbered = {int(match[1]): file for match, file in found if match}
        # Higher numbers are what a run has left that was resumed from before them; they are not this run's to delete.
        for number in sorted(number for number in numbered if number <= step)[: -self.keep]:
            numbered[number].unlink(missing_ok=True)
