"""What happens around a step, in order.

update, clamp, EMA (the module's ``optimizer_step``) → position → flags → stop → save (checkpoint callbacks, which
Lightning runs after all others; the module's own ``on_train_batch_end`` would come after them).

A step whose loss or gradient is not finite changes nothing, and no run goes on after it. The update is held back on the
device, by the ``found_inf`` that PyTorch's fused optimizers take, and the flag is read where that costs nothing: at
once on a CPU; on a GPU when figures are logged, and before anything is saved. Under 16-mixed the gradient scaler skips
such steps by itself, as it must while it looks for a scale: there they are counted.
"""

import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, callbacks, utilities
from torch import Tensor, nn, optim
from typing_extensions import override

from train_clip import files
from train_clip.errors import UserError
from train_clip.gather import WAIT, largest, on_any
from train_clip.models.blocks import training_norms
from train_clip.training import checkpoints, lightning_internals, signals

MOST_SKIPPED = 20  # steps in a row; each halves the scaler's scale, which starts at 65,536
READ_EVERY = 10  # steps between readings of the flag on a device that runs ahead, where nothing is logged

UNEVEN_SHARES = (
    "The processes have from {least:,} to {most:,} pairs in one batch; expected equally many. Drop the "
    "incomplete batch (drop_last=True), or let Lightning split the loader (a map-style data set, no sampler of yours)."
)
UNEVEN_EPOCHS = UNEVEN_SHARES.replace("pairs in one batch", "batches in one epoch")
OTHER_CHECKPOINTS = (
    "The processes resume from different checkpoints, after {least:,} to {most:,} batches. Name the checkpoint: "
    "--resume RUN/checkpoints/last.ckpt."
)


class EndOfStep(Callback):
    """Counts global batches, the position in the data; watches over the steps; and ends a run on a signal or an error.

    Whatever ends training while the weights are those of a step, and not within an update, saves that step's state: an
    error or signal while a batch is waited for, a loader process that is gone, another process of the run that is gone.

    A checkpoint restores the count only where the run is resumed from it (``fit(ckpt_path=…)``).
    """

    def __init__(self) -> None:
        self.consumed_batches = 0
        self.num_steps = 0  # optimizer steps of the whole run
        self.finite = FiniteSteps()
        self.signals = signals.StopSignals()
        self.children: list[subprocess.Popen[bytes]] = []
        # Batches up to the newest step, and what is to be saved of the loops; None while its state is being changed.
        self.newest: tuple[int, dict[str, Any]] | None = None
        self.saved_batches, self.leaves = 0, False

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            EndOfStep.__init__(self)  # Lightning restores a resumed run's count after this
            lightning_internals.announce_waits(trainer)

    @override
    def on_sanity_check_start(self, trainer: Trainer, *_: Any) -> None:
        # From Lightning, which gives them back at the end.
        self.signals.install(bool(trainer.checkpoint_callbacks))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.signals.install(bool(trainer.checkpoint_callbacks))
        self.children = lightning_internals.take_children(trainer)
        if self.children and trainer.strategy.root_device.type != "cpu":  # there, the exchange with one fails at once
            signals.end_after(lambda: self.children, signals.GRACE)
        lightning_internals.begin_next_epoch(trainer)
        self.finite.begin(pl_module, lightning_internals.gradient_scaler(trainer))
        if trainer.num_training_batches < float("inf"):
            self.require_equal_shares(int(trainer.num_training_batches), UNEVEN_EPOCHS)
        self.require_equal_shares(self.consumed_batches, OTHER_CHECKPOINTS)
        length = trainer.estimated_stepping_batches
        before, self.num_steps = self.num_steps, 0 if length == float("inf") else int(length)
        if before and before != self.num_steps:
            self._follow_length(trainer, before)

    def require_equal_shares(self, number: int, message: str = UNEVEN_SHARES) -> None:
        """Stop, on all processes, where they hold unequal shares of a batch: embeddings are gathered by equal ones."""
        most, negative_least = largest([number, -number])
        if most != -negative_least:
            raise UserError(message.format(least=-negative_least, most=most))

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        if self.finite.has_statistics:
            self.newest = None  # a forward pass changes them

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.newest = None
        self.finite.before_update(optimizer, self.consumed_batches + 1)

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.consumed_batches += 1
        steps, ends_epoch = lightning_internals.steps_and_ends(trainer)
        if not steps:
            return
        if trainer.global_step % (trainer.log_every_n_steps or READ_EVERY) == 0:  # type: ignore[attr-defined]
            self.finite.read()
        self.newest = self.consumed_batches, lightning_internals.loops_after_step(trainer)
        # An epoch's last batch is followed by validation and the epoch's end, which belong to it: a stop waits.
        if not ends_epoch:
            self._stop_if_asked(trainer)

    @override
    def on_validation_start(self, *_: Any) -> None:
        # No model is scored whose step went wrong.
        self.finite.read()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        # A run that ends within an epoch is over.
        if lightning_internals.steps_and_ends(trainer)[1]:
            self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step < self.num_steps:
            utilities.rank_zero_info(
                f"The run ended after {trainer.global_step:,} of {self.num_steps:,} optimizer steps, before the end "
                "of the learning rate schedule: it was stopped by another limit of the Trainer (--max_time, early "
                "stopping, a loader that ran out)."
            )

    @override
    def teardown(self, *_: Any, **__: Any) -> None:
        self.signals.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        WAIT.__exit__()
        if isinstance(exception, OSError | EOFError | RuntimeError):
            time.sleep(signals.TOGETHER)  # until it is known which processes have ended
            exception.__cause__ = lightning_internals.worker_failure() or exception.__cause__
        for line in filter(None, map(signals.end_of, self.children)):
            exception.add_note(line)
        if self.newest is not None and self.newest[0] > self.saved_batches:
            with signals.SAVING, suppress(Exception):  # what is raised here would hide the error
                self._save_alone(trainer, exception, *self.newest)
        self.signals.release()
        if isinstance(exception, signals.Stopped):
            signals.end_loaders()  # Lightning would wait some seconds for each one that hangs
        # Lightning gives the model back at the end of training, but not after an error.
        pl_module.teardown("fit")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.saved_batches = self.consumed_batches
        if self.leaves and self.newest is not None:
            checkpoint["loops"]["fit_loop"] = self.newest[1]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"consumed_batches": self.consumed_batches, "num_steps": self.num_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed_batches, self.num_steps = state_dict["consumed_batches"], state_dict.get("num_steps", 0)

    def _follow_length(self, trainer: Trainer, before: int) -> None:
        if self.num_steps <= trainer.global_step:
            raise UserError(
                f"The run has done {trainer.global_step:,} optimizer steps of {before:,}, and its length is now "
                f"{self.num_steps:,}: no steps are left, and the learning rate is 0. Increase --epochs or "
                "--max_steps, or use the earlier --accumulate_grad_batches."
            )
        for schedule in [config.scheduler for config in trainer.lr_scheduler_configs]:
            if isinstance(schedule, optim.lr_scheduler.LambdaLR):
                for group, share in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
                    group["lr"] = group["initial_lr"] * share(schedule.last_epoch)
        utilities.rank_zero_info(
            f"The length of the run changed from {before:,} to {self.num_steps:,} optimizer steps. From step "
            f"{trainer.global_step:,} on, the learning rate follows the new length."
        )

    def _save_alone(self, trainer: Trainer, error: BaseException, batches: int, _: Any) -> None:
        # By the first process; or, where that was killed, by another one. None waits for any other.
        with ExitStack() as stack:
            if not trainer.is_global_zero:
                time.sleep(1)  # until the system has taken from it what it held
                folder = Path(trainer.default_root_dir)
                if not (folder / files.LOCK).exists():
                    return
                stack.enter_context(files.held(folder))  # which fails while the first one lives
            if not lightning_internals.leave_others(trainer, signals.PATIENCE):
                return
            self.finite.read()
            if not trainer.is_global_zero:
                trainer.strategy.cluster_environment.set_global_rank(0)  # type: ignore[attr-defined]
            self.consumed_batches, self.leaves = batches, True
            if saved := _save(trainer):
                if isinstance(error, signals.Stopped):
                    name = signals.name_of(int(error.code or 0) - 128)
                    print(f"Stopped by {name} after batch {batches:,}; saved {saved}.")
                else:
                    error.add_note(f"Saved after batch {batches:,}: {saved}.")

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if number := largest([self.signals.received])[0]:
            saved = save_now(trainer)
            utilities.rank_zero_info(
                f"Stopped by {signals.name_of(number)} after batch {self.consumed_batches:,}; saved "
                f"{saved or 'nothing, since the run has no checkpoints'}."
            )
            raise signals.Stopped(128 + number)


class FiniteSteps:
    """Watches the loss and the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.scaler: Any = None  # of 16-mixed
        self.skipped_in_a_row = 0
        self.first_batch = 0  # the last one of the first step
        self.gradient_norm = torch.zeros(())
        self._losses: list[Tensor] = []  # of the batches of this step
        self._report = torch.zeros(2)  # the first batch that was not finite, or 0; its loss
        self._statistics: list[tuple[Tensor, Tensor]] = []  # of BatchNorms, and a copy, for a step that is skipped

    @property
    def has_statistics(self) -> bool:
        """Whether forward passes change running statistics."""
        return bool(self._statistics)

    def note_loss(self, loss: Tensor) -> Tensor:
        """Take note of a batch's loss, () float, and see to it that one that is not finite has no finite gradient."""
        value = loss.detach().float()
        self._losses.append(value)
        return loss * torch.where(value.isfinite(), 1.0, torch.nan).to(loss.dtype)

    def begin(self, module: nn.Module, scaler: Any) -> None:
        """Note what a step that is skipped, and survived, must leave as it was."""
        self.scaler = scaler
        buffers = [buffer for norm in training_norms(module) for buffer in norm.buffers()]
        self._statistics = [(buffer, buffer.clone()) for buffer in buffers]

    def before_update(self, optimizer: optim.Optimizer, batch: int) -> None:
        """Look at a step's gradient, unscaled by now; ``batch`` is the number of the step's last batch, from 1."""
        self.first_batch = self.first_batch or batch
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        bad = on_any(~self.gradient_norm.isfinite())
        loss, self._losses = torch.stack(self._losses or [bad]).mean(), []
        if self.scaler is not None:
            self._count(bool(bad), batch)
            return
        found = torch.stack([torch.full_like(bad, batch), loss])
        known = self._report.to(bad.device)
        self._report = torch.where(known[0] > 0, known, torch.where(bad > 0, found, 0.0))
        if known_at_once(bad) or not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.read()
        else:
            # From the first bad step to the reading of the flag nothing is updated any more.
            optimizer.found_inf = (self._report[0] > 0).float()  # type: ignore[attr-defined]

    def read(self) -> None:
        """Read the flag, which waits for the device; a ``UserError`` where a step was not finite."""
        batch, loss = self._report.tolist()
        if batch:
            advice = "Use a lower --learning_rate, more --warmup_steps or --gradient_clip_val 1.0"
            if batch == self.first_batch:
                advice = "It was the first step: check the weights that training starts from, and --precision"
            raise UserError(
                f"Batch {batch:,.0f}: the loss is {loss:.4g}, its gradient not finite; expected finite numbers. "
                f"Neither this batch nor a later one changed any weights or a checkpoint. {advice}; if it is the same "
                "batch each time, look for an unusual image or caption in it."
            )

    def _count(self, bad: bool, batch: int) -> None:
        # The scaler skips a bad step; what its forward pass did to running statistics is undone.
        if not bad:
            self.skipped_in_a_row = 0
            for buffer, kept in self._statistics:
                kept.copy_(buffer)
            return
        self.skipped_in_a_row += 1
        for buffer, kept in self._statistics:
            buffer.copy_(kept)
        scale = self.scaler.get_scale() * self.scaler.get_backoff_factor()
        if self.skipped_in_a_row >= MOST_SKIPPED or scale < 1:
            raise UserError(
                f"Batch {batch:,}: the gradient was not finite in {self.skipped_in_a_row} steps in a row, with the "
                f"gradient scale down to {scale:g}. Expected a finite gradient within {MOST_SKIPPED} steps, at a "
                "scale of 1 or above. These steps changed no weights. Try --precision bf16-mixed, or 32-true if the "
                "GPU does not support bfloat16; or a lower --learning_rate."
            )


def known_at_once(flag: Tensor) -> bool:
    """Whether reading a flag waits for nothing."""
    return flag.is_cpu


def save_now(trainer: Trainer) -> Path | None:
    """Save the run beside its other checkpoints, on all processes, no gradient pending; None where it has none."""
    if not lightning_internals.steps_and_ends(trainer)[1]:
        lightning_internals.log_step(trainer)  # its last step's figures are still to be logged
    return _save(trainer)


def _save(trainer: Trainer) -> Path | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, checkpoints.Checkpoints):
            return callback.save(trainer)
        if isinstance(callback, callbacks.ModelCheckpoint) and callback.dirpath and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path, number = Path(callback.dirpath, "last.ckpt"), 0
            # One of another run in the same folder stays, as with Lightning's own.
            while path.exists() and str(path) not in (callback.last_model_path, str(trainer.ckpt_path)):
                number += 1
                path = path.with_name(f"last-v{number}.ckpt")
            trainer.save_checkpoint(path, weights_only=False)
            return path
    return None
