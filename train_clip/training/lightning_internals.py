"""What a Trainer is at, as the callbacks of this package ask it."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


def resuming(trainer: L.Trainer | None) -> bool:
    """Whether a checkpoint that is loaded is one to train on from; validation and ``load_from_checkpoint`` load too."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def gradient_scaler(trainer: L.Trainer) -> Any:
    """The scaler of 16-mixed precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def begin_next_epoch(trainer: L.Trainer) -> None:
    """Where a run is resumed at the end of an epoch, begin with the next one, from ``on_train_start``.

    With ``max_steps`` set, Lightning (2.6.6, ``FitLoop.restarting``) takes every epoch for one to be gone on with,
    finds no batch left in it and counts it once more, so that ``max_epochs`` ends the run an epoch early. Without
    ``max_steps`` it does what is done here.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop._restarting = loop.epoch_loop.restarting = False
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()


def last_batch(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a batch is its epoch's last."""
    return trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches


def log_step(trainer: L.Trainer) -> None:
    """Write a step's figures from ``on_train_batch_end``: Lightning does it after that hook, too late if that ends."""
    trainer._logger_connector.update_train_step_metrics()


def gradient_pending(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a batch's gradient waits for others (``accumulate_grad_batches``); an epoch's last batch always steps."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not last_batch(trainer, batch_idx)
