"""A training run, whatever verb asked for it: its folder, its configuration, its length, and how it goes on.

Silences what Lightning says about itself, so that what is left is about the run.

Lightning's Trainer of a run, with this package's callbacks, loggers and writer of checkpoints.

What a run says when it begins and when it has ended: its size and place, and the command that comes next.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from train_clip.commands.options import RunOptions, TrainerOptions, require_least
from train_clip.commands.run_folder import Resumption, choose_run_folder, find_checkpoint, write_run_files
from train_clip.errors import UserError
from train_clip.training.checkpoints import BY_RECALL, AtomicCheckpointIO, Best, Checkpoints, Interval
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.display import Curves, MetricsLog, RunProgress, Throughput
from train_clip.training.module import ContrastiveModule
from train_clip.training.signals import Stopped, end_with_starter

# Messages that are about Lightning's products, repeat what the verb prints, or describe how it is meant to be here.
NOT_ABOUT_THE_RUN = (
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
)
WARNINGS_BY_DESIGN = (
    # PyTorch's own renaming, met in Lightning.
    r".*LeafSpec.*is deprecated.*",
    # On a CPU every batch is logged in the display; short epochs are common with few pairs.
    r".*smaller than the logging interval.*",
    # The loader's workers are chosen by the device; see DataOptions.num_workers.
    r".*does not have many workers which may be a bottleneck.*",
    # No validation split where none is held out; ``overfit_batches`` as its documentation says.
    r".*Total length of `list` across ranks is zero.*",
    r".*defined a `validation_step` but have no `val_dataloader`.*",
    r".*requested to overfit but enabled train dataloader shuffling.*",
    # A teacher and locked towers stay in eval mode.
    r"Found \d+ module\(s\) in eval mode at the start of training.*",
    # This package's own loaders go on by the count of batches.
    r".*your dataloader is not resumable.*",
)


def quiet() -> None:
    """Drop those messages for the rest of the process."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(NOT_ABOUT_THE_RUN)
    )
    for pattern in WARNINGS_BY_DESIGN:
        warnings.filterwarnings("ignore", message=pattern)


def resolve_trainer(options: TrainerOptions) -> dict[str, Any]:
    """Fill in the default that differs from Lightning's: precision by device."""
    resolved = dict(options)
    if resolved.get("precision") is None:
        resolved["precision"] = default_precision(resolved.get("accelerator", "auto"))
    return resolved


def default_precision(accelerator: Any) -> str:
    """bf16-mixed where the GPU has it, otherwise 16-mixed; float32 without a CUDA device."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def build_trainer(
    options: dict[str, Any], folder: Path, epochs: int, saving: Checkpoints, first_step: int = 0
) -> L.Trainer:
    """Make Lightning's Trainer with this package's callbacks beside the user's.

    Args:
        options: the Trainer's arguments as plain values, resolved.
        folder: the run's.
        epochs: passes over the data.
        saving: when to save, and what to keep.
        first_step: optimizer steps that a run which is resumed has done.

    Raises:
        UserError: options that do not go together, or that need what is not there.
    """
    made = {name: _instantiate(value) for name, value in options.items()}
    callbacks: list[L.Callback] = [Throughput(), Curves(folder)]
    if made.get("enable_progress_bar") is not False:
        callbacks.append(RunProgress())
        made["enable_progress_bar"] = False
    if made.get("enable_checkpointing") is not False:
        callbacks.append(saving)
    own = made.get("callbacks") or []
    made["callbacks"] = callbacks + (own if isinstance(own, list) else [own])
    plugins = made.get("plugins") or []
    made["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
    made["logger"] = _loggers(made.get("logger"), folder, first_step)
    if made.get("enable_model_summary") is None:
        made["enable_model_summary"] = False
    try:
        return L.Trainer(**made, max_epochs=epochs, default_root_dir=folder)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"Lightning's Trainer refuses these options: {error}") from error


def _loggers(asked: Any, folder: Path, first_step: int) -> list[Logger] | bool:
    """CSV always, for the curves; TensorBoard where the user names no other logger; none for ``--logger false``."""
    if asked is False:
        return False
    csv = MetricsLog(folder, first_step)
    if asked in (None, True):
        return [csv, TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_step or None)]
    return [csv, *(asked if isinstance(asked, list) else [asked])]


def _instantiate(value: Any) -> Any:
    """Turn ``{class_path, init_args}`` into an object, also within a list; leave the rest as it is."""
    if isinstance(value, list):
        return [_instantiate(item) for item in value]
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    try:
        return instantiate_class((), value)
    except ImportError as error:
        raise UserError(f"{value['class_path']}: {error}. Install the package that it needs.") from error


def say_start(module: ContrastiveModule, trainer: L.Trainer, folder: Path, resumed: Resumption | None) -> None:
    """Name the model, its size, the device and the run's folder, and what the run goes on from."""
    if trainer.is_global_zero:
        if resumed is not None:
            for reason in resumed.passed_over:
                print(f"Passed over {reason}")
            batches = resumed.state["callbacks"]["EndOfStep"]["consumed_batches"]
            print(f"Resuming from {resumed.checkpoint}, after {resumed.step:,} steps and {batches:,} batches.")
        device, model = trainer.strategy.root_device.type, module.model
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        share = "" if trained >= count(model) else f" ({trained:,} of them trained)"
        print(
            f"{model.name}: {count(model):,} parameters{share}, {model.image_size}×{model.image_size} pixels; "
            f"{trainer.world_size} × {device}, {trainer.precision}. Everything goes to {folder}/."
        )


def say_end(trainer: L.Trainer, folder: Path, data: TextImageDataModule) -> None:
    """Name what the run left, and the command that evaluates it."""
    if not trainer.is_global_zero:
        return
    print(f"Done after {trainer.global_step:,} steps. What the run left is in {folder}/.")
    checkpoints = {file.stem: file for file in (folder / "checkpoints").glob("*.ckpt")}
    if not checkpoints:
        return
    command = ["train-clip", "evaluate", str(checkpoints.get("best", checkpoints["last"]))]
    table = data.val_table or data.options.pairs
    command += ["--folder", str(data.folder)] if table is None else ["--pairs", str(table)]
    if table is not None:
        command += _changed_columns(data)
    elif data.options.pair_by != "stem":
        command += ["--pair_by", data.options.pair_by]
    if data.validation_pairs:
        if data.val_table is None:
            command += ["--split", "held_out", "--val_share", str(data.val_share)]
        if "val/loss" not in trainer.callback_metrics:
            best = "best.ckpt is as it was before" if "best" in checkpoints else "there is no best.ckpt"
            print(f"No validation was reached, so {best}; --val_check_interval sets how often it comes.")
    print(f"Next: {shlex.join(command)}")
    say_mean(trainer, folder)


def say_mean(trainer: L.Trainer, folder: Path) -> None:
    """Name the running mean's best file, where it has scored better than the weights that were trained."""
    best = folder / "ema" / "best.ckpt"
    for saving in trainer.checkpoint_callbacks:
        if isinstance(saving, Checkpoints) and saving.mean_is_better and best.is_file():
            print(
                f"The running mean of the weights scored better: {saving.best_by.figure} {saving.best_mean:.4f}, the "
                f"trained weights {saving.best:.4f}. Evaluate it by {best} in place of the file above."
            )


def _changed_columns(data: TextImageDataModule) -> list[str]:
    """The options that name a table's columns, where they are not called what they are called by default."""
    named = {"image": data.options.image_column, "caption": data.options.caption_column}
    return [word for usual, name in named.items() if name != usual for word in (f"--{usual}_column", name)]


def count(module: nn.Module) -> int:
    """All numbers that the module's parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())


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
