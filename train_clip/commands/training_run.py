"""A training run, whatever verb asked for it: its folder, its configuration, its length, and how it goes on."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from train_clip.commands.lightning_trainer import build_trainer, resolve_trainer
from train_clip.commands.options import RunOptions, TrainerOptions, require_least
from train_clip.commands.quiet import quiet
from train_clip.commands.resume import Resumption, find_checkpoint
from train_clip.commands.run_folder import choose_run_folder, write_run_files
from train_clip.commands.run_report import count, say_end, say_start
from train_clip.errors import UserError
from train_clip.training.checkpoints import BY_RECALL, Best, Checkpoints, Interval
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.module import ContrastiveModule
from train_clip.training.signals import Stopped, end_with_starter

LOG_EVERY = 10  # optimizer steps, or fewer where the run would have less than
MIN_POINTS = 50  # logged points


def no_advice(_: int) -> None:
    """Nothing to say of any number of pairs."""


@dataclass(frozen=True)
class Job:
    """What a verb trains.

    Args:
        verb: its name on the command line.
        module: the model and how it is trained.
        data: the pairs.
        epochs: where neither ``--epochs`` nor ``--max_steps`` is given.
        options: the verb's own options as the run's ``config.yaml`` keeps them, resolved, given the run's folder.
        best_by: what its ``best.ckpt`` is best at.
        advice: a line to begin a run on so many pairs with, if there is something to say.
    """

    verb: str
    module: ContrastiveModule
    data: TextImageDataModule
    epochs: int
    options: Callable[[Path], tuple[Any, ...]]
    best_by: Best = BY_RECALL
    advice: Callable[[int], str | None] = no_advice


def begin(run: RunOptions) -> Resumption | None:
    """What comes before a model is made: signals, seed, and the checkpoint that the run goes on from.

    Raises:
        UserError: numbers that cannot work, or nothing to go on from.
    """
    quiet()
    end_with_starter()
    require_least(seed=(run.seed, 0), keep=(run.keep, 1))
    L.seed_everything(run.seed, verbose=False)
    return None if run.resume is None else find_checkpoint(run.resume, run.output)


def train_job(job: Job, run: RunOptions, trainer: TrainerOptions, resumed: Resumption | None) -> Path:
    """Train.

    Args:
        job: what.
        run: length, seed and folder.
        trainer: arguments of Lightning's Trainer.
        resumed: what the run goes on from.

    Returns:
        The run's folder.
    """
    module, data = job.module, job.data
    folder = choose_run_folder(run.output, module.model.name, resumed)
    options = resolve_trainer(trainer)
    saving = Checkpoints(
        folder / "checkpoints",
        None if run.save_every is None else Interval.parse(str(run.save_every)),
        run.keep,
        job.best_by,
        folder / "ema",
    )
    epochs = _epochs(run, trainer, job.epochs)
    lightning_trainer = build_trainer(options, folder, epochs, saving, first_step=resumed.step if resumed else 0)
    # Before anything is written: a mistake leaves no half-made run behind.
    data.trainer = lightning_trainer
    data.setup()
    if resumed is None and (line := job.advice(len(data.training_pairs))):
        rank_zero_info(line)
    module.require_batch_size(data.batch_size)
    module.require_precision(lightning_trainer.precision)
    num_steps = _num_steps(data, lightning_trainer)
    if resumed is not None:
        _require_same_run(module, data, resumed, num_steps)
    if trainer.get("log_every_n_steps") is None:
        lightning_trainer.log_every_n_steps = _log_every(num_steps)  # type: ignore[attr-defined]
    resolved = dataclasses.replace(run, epochs=epochs, output=None, resume=None)
    write_run_files(
        folder,
        _config(*job.options(folder), resolved, options),
        {"verb": job.verb, "parameters": count(module.model), "pairs": len(data.training_pairs)},
        resumed,
    )
    say_start(module, lightning_trainer, folder, resumed)
    _fit(lightning_trainer, job, resumed, folder)
    say_end(lightning_trainer, folder, data)
    return folder


def _epochs(run: RunOptions, trainer: TrainerOptions, usual: int) -> int:
    """The epochs that were asked for; without a word on them, as many as ``--max_steps`` takes, or the usual ones."""
    if run.epochs is not None:
        return run.epochs
    return -1 if (trainer.get("max_steps") or -1) > 0 else usual


def _require_same_run(
    module: ContrastiveModule, data: TextImageDataModule, resumed: Resumption, num_steps: float
) -> None:
    """Refuse a checkpoint of another model, optimizer or order of the data, or of a run that is over."""
    module.require_same_model(resumed.state.get("hyper_parameters", {}))
    data.require_same_data(resumed.state.get(type(data).__qualname__, {}))
    if num_steps <= resumed.step:
        raise UserError(
            f"{resumed.checkpoint}: the run has done {resumed.step:,} steps, and is to take {num_steps:,} in all. To "
            "train on give more --epochs or --max_steps."
        )


def _fit(trainer: L.Trainer, job: Job, resumed: Resumption | None, folder: Path) -> None:
    """Train, and say how to go on where the run is stopped."""
    try:
        trainer.fit(job.module, job.data, ckpt_path=None if resumed is None else resumed.checkpoint, weights_only=True)
    except Stopped:
        if trainer.is_global_zero and trainer.checkpoint_callbacks:
            print(f"To go on: {shlex.join(['train-clip', job.verb, '--resume', str(folder)])}")
        raise
    except MisconfigurationException as error:
        raise UserError(f"Lightning's Trainer cannot train this: {error}") from error
    if resumed is not None and trainer.global_step == resumed.step:
        raise UserError(
            f"{resumed.checkpoint}: not one step was trained after its {resumed.step:,}. Expected the Trainer's other "
            "limits, such as --max_time, to leave something to do."
        )
    if trainer.global_step == 0:
        raise UserError("Not one step was trained. Expected --epochs, --max_steps and the Trainer's limits above 0.")


def _num_steps(data: TextImageDataModule, trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run, as the Trainer's limits have it; infinity where they have none."""
    batches, limit = len(data.training_pairs) // data.batch_size, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    # -1 is no limit, as in the Trainer.
    return min((limit for limit in (by_epochs, trainer.max_steps) if limit >= 0), default=math.inf)


def _log_every(num_steps: float) -> int:
    """Every tenth step, or oftener where the run would have too few points for a curve."""
    return int(max(1, min(LOG_EVERY, num_steps // MIN_POINTS)))


def _config(*groups: Any) -> dict[str, Any]:
    """Every option of the run, flat, in plain values."""
    flat: dict[str, Any] = {}
    for group in groups:
        flat |= group if isinstance(group, dict) else dataclasses.asdict(group)
    return {name: str(value) if isinstance(value, Path) else value for name, value in flat.items()}
