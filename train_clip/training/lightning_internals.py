"""Everything that uses private parts of Lightning, and questions that several callbacks ask a Trainer."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from train_clip.errors import UserError

REFUSALS = (
    MisconfigurationException,
    ValueError,
    TypeError,
    RuntimeError,
    NotImplementedError,
    LookupError,
    ImportError,
)
LIBRARIES = ("lightning", "jsonargparse", "torch.distributed")
FROM_SLURM = (
    " Start one task for each device by srun, with --devices as --ntasks-per-node; without SLURM, unset SLURM_NTASKS."
)


@contextmanager
def told_in_a_line(kind: type[UserError], what: str) -> Iterator[None]:
    """Turn whatever Lightning itself refuses within, and no other code does, into one line of this kind of error."""
    try:
        yield
    except REFUSALS as error:
        if "iter(combined_loader)" in str(error) and isinstance(error.__context__, OSError | UserError):
            raise error.__context__ from None  # a loader could not be started, and then not be ended
        names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        # Where it was raised, the standard library aside: of its variables Lightning asks `os` for some.
        name = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names][-1]
        if not f"{name}.".startswith(tuple(f"{library}." for library in LIBRARIES)):
            raise
        # Where a class refuses its arguments, the parser adds why each other type of the option does not fit.
        of_class = re.search(r"\nErrors:\n  - (.+?)(?:\n  - |\nGiven|\Z)", str(error), re.DOTALL)
        text = " ".join((of_class[1] if of_class else str(error)).split()) or type(error).__name__
        if isinstance(error, KeyError):
            text = f"{error.args[0]} is missing"
        advice = FROM_SLURM if "SLURM" in text else ""
        raise kind(f"{what}: {text.rstrip('.')}.{advice} --help_trainer describes its options.") from error


def copies_this_process(trainer: Trainer) -> bool:
    """Whether a Trainer's processes begin as copies of this one (spawn, fork), to which their state never returns."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def trainer_of(module: LightningModule) -> Any:
    """The Trainer that a module is attached to, or None, where ``module.trainer`` raises."""
    return module._trainer


def is_compiled(module: LightningModule) -> bool:
    """Whether a module comes to its Trainer out of ``torch.compile``."""
    return module._compiler_ctx is not None


def resuming(trainer: Trainer | None) -> bool:
    """Whether a checkpoint that is loaded is one to train on from; validation and ``load_from_checkpoint`` load too."""
    return trainer is not None and trainer.state.fn == "fit"


def gradient_scaler(trainer: Trainer) -> Any:
    """The scaler of 16-mixed precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def begin_next_epoch(trainer: Trainer) -> None:
    """Where a run is resumed at the end of an epoch, begin with the next one, from ``on_train_start``.

    With ``max_steps`` set, Lightning (2.6.6, ``FitLoop.restarting``) goes on with any epoch, finds no batch left in it
    and counts it once more, so that ``max_epochs`` ends the run an epoch early. Without, it does what is done here.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop._restarting = loop.epoch_loop.restarting = False
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()


def steps_and_ends(trainer: Trainer) -> tuple[bool, bool]:
    """Whether the newest batch completes an optimizer step (no gradient is pending), and whether it ends its epoch."""
    batches = trainer.fit_loop.epoch_loop.batch_idx + 1
    last = trainer.is_last_batch or batches >= trainer.num_training_batches
    # An epoch's last batch always steps.
    return last or batches % trainer.accumulate_grad_batches == 0, last


def log_step(trainer: Trainer) -> None:
    """Write a step's figures from ``on_train_batch_end``: Lightning does it after that hook, too late if that ends."""
    trainer._logger_connector.update_train_step_metrics()


def release_children(trainer: Trainer) -> None:
    """Keep Lightning from killing this process because those that it started end first, with a code that is not 0."""
    getattr(trainer.strategy.launcher, "procs", []).clear()
