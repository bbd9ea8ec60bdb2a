"""Everything that uses private parts of Lightning, and questions that several callbacks ask a Trainer."""

import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import strategies
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import distributed
from torch._C import _error_if_any_worker_fails

from train_clip.errors import UserError, of_process
from train_clip.gather import WAIT

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
        if of_process(error):
            raise
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


def saves_folders(trainer: Trainer) -> bool:
    """Whether a Trainer's checkpoints are folders of parts, which neither resume nor load here."""
    strategy = trainer.strategy
    return getattr(strategy, "_save_distributed_checkpoint", getattr(strategy, "_state_dict_type", "") == "sharded")


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


def loops_after_step(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint of the newest step is to hold of the loops; where that ended its epoch, as at the epoch's end.

    Resumed from the state within ``on_train_batch_end`` of an epoch's last batch, Lightning (2.6.6) counts the next
    epoch as finished and never as begun, and trains too much where a run is resumed once more.
    """
    loops = trainer.fit_loop.state_dict()
    if steps_and_ends(trainer)[1]:
        for progress, name in ("epoch_loop.batch_progress", "completed"), ("epoch_progress", "processed"):
            for counts in loops[progress]["total"], loops[progress]["current"]:
                counts[name] += 1
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    return loops


def log_step(trainer: Trainer) -> None:
    """Write a step's figures from ``on_train_batch_end``: Lightning does it after that hook, too late if that ends."""
    trainer._logger_connector.update_train_step_metrics()


def children_of(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes that Lightning has started, until they are taken from it."""
    return getattr(trainer.strategy.launcher, "procs", [])


def take_children(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes that Lightning has started; it no longer kills this one where one of them ends by an error."""
    own = [*(its := children_of(trainer))]
    its.clear()
    return own


def announce_waits(trainer: Trainer) -> None:
    """Have it known while the Trainer waits for a batch or, which makes an iterator, for the first one."""

    def begin() -> None:
        WAIT.__enter__()
        WAIT.for_batch = True
        _error_if_any_worker_fails()  # of an end whose signal came while nothing was waited for

    def announce(loop: Any, name: str) -> None:
        def wait(*args: Any) -> None:
            begin()
            getattr(type(loop), name)(loop, *args)
            WAIT.__exit__()

        loop._on_before_fetch, loop._on_after_fetch = begin, WAIT.__exit__
        setattr(loop, name, wait)

    announce(trainer.fit_loop.epoch_loop, "on_run_start")
    announce(trainer.fit_loop.epoch_loop.val_loop, "reset")


def raise_in_waits(*_: object) -> None:
    """Handle SIGCHLD: as PyTorch, which raises where a loader process is gone, but never in the middle of a step."""
    if WAIT.since:
        _error_if_any_worker_fails()


def worker_failure() -> RuntimeError | None:
    """What PyTorch says of a loader process that is gone, where that was not said yet."""
    try:
        _error_if_any_worker_fails()
    except RuntimeError as error:
        return error
    return None


def leave_others(trainer: Trainer, seconds: float) -> bool:
    """Go on as the only process, after an error; whether this one holds all of the run's state, and it is complete.

    On a GPU it is not as long as an exchange with a process that is gone is waited for, which never ends.
    """
    if not isinstance(trainer.strategy, strategies.SingleDeviceStrategy | strategies.DDPStrategy):
        return False
    if trainer.strategy.root_device.type == "cuda":
        (done := torch.cuda.Event()).record()
        until = time.monotonic() + seconds
        while not done.query():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    return True
