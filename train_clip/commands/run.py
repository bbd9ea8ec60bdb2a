"""A training run, for any command: its Trainer, folder, length and messages."""

import logging
import math
import re
import shlex
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import utilities

from train_clip import cores, files, printing
from train_clip.commands.run_folder import Resumption, claimed, find_checkpoint, write_run_files
from train_clip.commands.trainer import build_trainer, default_precision
from train_clip.errors import UsageError, UserError, root_cause
from train_clip.estimates import require_room, size
from train_clip.models.config import OWN_MODEL
from train_clip.options import DataOptions, RunOptions, TrainerOptions, flat
from train_clip.training import checkpoints, display, half_precision, lightning_internals, signals
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.module import ContrastiveModule
from train_clip.training.optimizer import build_optimizer

# Messages that are about Lightning's products, repeat what the verb prints, or describe how it is meant to be here.
NOT_ABOUT_THE_RUN = re.compile(
    r"GPU available|TPU available|💡 Tip|Loading `train_dataloader`|`Trainer.fit` stopped"
    r"|Restoring states from the checkpoint path|Restored all states from the checkpoint"
)
WARNINGS_BY_DESIGN = (
    # PyTorch's own renaming, met in Lightning.
    r".*LeafSpec.*is deprecated"
    # On a CPU every batch is logged in the display; short epochs are common with few pairs.
    r"|.*smaller than the logging interval"
    # The loader's workers are chosen by the device; see DataOptions.num_workers.
    r"|.*does not have many workers which may be a bottleneck"
    # No validation split where none is held out; ``overfit_batches`` as its documentation says.
    r"|.*Total length of `list` across ranks is zero|.*defined a `validation_step` but have no `val_dataloader`"
    r"|.*requested to overfit but enabled train dataloader shuffling"
    # A teacher and locked towers stay in eval mode; this package's own loaders go on by the count of batches.
    r"|Found \d+ module\(s\) in eval mode at the start of training|.*your dataloader is not resumable"
)

LOG_EVERY = 10  # optimizer steps, or fewer where the run would have less than
MIN_POINTS = 50  # logged points
WIDTHS = {"64-true": 2.0, "16-true": 0.5, "bf16-true": 0.5}  # precisions of all numbers, next to float32


@dataclass(frozen=True)
class Job:
    """What a command trains."""

    verb: str  # its name on the command line
    module: ContrastiveModule
    data: TextImageDataModule
    options: dict[str, Any]  # the verb's, flat, for the run's config.yaml
    epochs: int  # where neither --epochs nor --max_steps is given
    best_by: str = checkpoints.BY_RECALL  # what its best.ckpt is best at
    advice: Any = None  # a function of the number of pairs and the kind of device: a line for a new run, or None
    own_model: dict[str, Any] | None = None  # of no preset: kept in the run, to be repeated when its file has changed


def begin(run: RunOptions, seed: int) -> Resumption | None:
    """Before the model is built: streams, signals, the seed, and the checkpoint to resume from, if any."""
    printing.go_on_unread()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not NOT_ABOUT_THE_RUN.match(record.getMessage())
    )
    warnings.filterwarnings("ignore", message=WARNINGS_BY_DESIGN)
    signals.end_with_starter()
    L.seed_everything(seed, verbose=False)
    return None if run.resume is None else find_checkpoint(run.resume, run.output)


def remake(kind: Any, arguments: Any, source: str, **how: Any) -> Any:
    """The module of a checkpoint's ``arguments``, before its weights are loaded, to be trained in another way."""
    try:
        return kind(**{name: arguments[name] for name in kind.names_of_model}, **how)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:
        raise UserError(
            f"{source}: cannot be loaded ({root_cause(error)}). Expected a checkpoint that this version of train-clip "
            "wrote."
        ) from error


def data_for(module: ContrastiveModule, options: DataOptions) -> TextImageDataModule:
    """The pairs as a module takes them."""
    size, seed = module.model.image_size, module.options.step.seed
    return TextImageDataModule(image_size=size, custom_tokenizer=module.tokenizer, seed=seed, **flat(options))


def train_job(job: Job, run: RunOptions, options: TrainerOptions, resumed: Resumption | None) -> Path:
    """Train, from the start or from a checkpoint; return the run's folder."""
    with claimed(run.output, job.module.model.name, resumed) as folder:
        _train_in(folder, job, run, options, resumed)
    return folder


def _train_in(folder: Path, job: Job, run: RunOptions, options: TrainerOptions, resumed: Resumption | None) -> None:
    module, data = job.module, job.data
    if resumed is None and data.source.is_dir() and folder.resolve().is_relative_to(data.source.resolve()):
        raise UserError(
            f"{folder}: lies in {data.source}/, where the next run would take its curves for data. Give an --output "
            "outside the data folder."
        )
    options |= {"precision": options.get("precision") or default_precision(options.get("accelerator", "auto"))}
    if run.epochs is None:
        # As many as --max_steps takes, or the usual ones.
        run = replace(run, epochs=-1 if (options.get("max_steps") or -1) > 0 else job.epochs)
    steps_before = resumed.step if resumed else 0
    trainer = build_trainer(options, folder, run, run.best_by or job.best_by, steps_before)
    # Before anything is written: a mistake leaves no half-made run behind.
    data.trainer = trainer
    data.setup()
    if (run.best_by or "").startswith("val/") and not data.validation_pairs:
        raise UsageError(
            f"--best_by {run.best_by}: is of held-out pairs; found none. Expected some (--val_share, --val_pairs), or "
            "a figure NAME/… of --evaluate."
        )
    device = trainer.strategy.root_device.type
    if resumed is None and job.advice and (line := job.advice(len(data.training_pairs), device)):
        utilities.rank_zero_info(line)
    module.require_batch_size(data.batch_size)
    module.require_precision(trainer.precision)
    facts = {"verb": job.verb, "parameters": count(module.model), "pairs": len(data.training_pairs)}
    num_steps = _num_steps(data, trainer)
    if resumed is not None:
        module.require_same_model(resumed.arguments)
        data.require_same_data(resumed.state.get(type(data).__qualname__, {}))
        facts |= {"resumed_from": str(resumed.checkpoint), "after_steps": steps_before}
    if num_steps <= steps_before:
        raise UserError(
            f"{resumed.checkpoint if resumed else folder}: the run has done {steps_before:,} steps, and its length is "
            f"{num_steps:,} steps. To train longer, increase --epochs or --max_steps."
        )
    if options.get("log_every_n_steps") is None:
        trainer.log_every_n_steps = int(max(1, min(LOG_EVERY, num_steps // MIN_POINTS)))  # type: ignore[attr-defined]
    room = room_for(module, trainer, folder)
    write_run_files(folder, settled(job, run, folder) | options, facts, job.own_model)
    say_start(module, trainer, folder, resumed)
    epochs = f", up to epoch {run.epochs:,}" if run.epochs and run.epochs > 0 else ""
    utilities.rank_zero_only(print)(f"Optimizer steps to come: {num_steps - steps_before:,}{epochs}.{room}")
    # While they start, they wait for each other.
    signals.end_after(partial(lightning_internals.children_of, trainer), signals.PATIENCE)
    try:
        with lightning_internals.told_in_a_line(UserError, "Lightning's Trainer cannot train this"):
            trainer.fit(module, data, ckpt_path=resumed.checkpoint if resumed else None, weights_only=True)
    except BaseException as stop:
        saved = trainer.global_step > steps_before and (folder / "checkpoints" / checkpoints.LAST).is_file()
        if trainer.is_global_zero and saved:
            line = f"To resume: {shlex.join(['train-clip', job.verb, '--resume', str(folder)])}"
            print(line) if isinstance(stop, signals.Stopped) else stop.add_note(line)
        raise
    say_end(trainer, folder, data, run.best_by or job.best_by)


@utilities.rank_zero_only
def say_start(module: ContrastiveModule, trainer: L.Trainer, folder: Path, resumed: Resumption | None) -> None:
    """Name the model, its size, the device, the run's folder, and the checkpoint it resumes from."""
    if resumed is not None:
        batches = resumed.state["callbacks"]["EndOfStep"]["consumed_batches"]
        print(f"Resuming from {resumed.checkpoint}, after {resumed.step:,} steps and {batches:,} batches.")
    device, model = trainer.strategy.root_device.type, module.model
    print(
        f"{model.name}: {count(model):,} parameters ({count(module, trained=True):,} trainable), "
        f"{model.image_size}×{model.image_size} pixels; {trainer.world_size} × {device}, {trainer.precision}. "
        f"Output folder: {folder}/."
    )
    if load := cores.say_load():
        print(load)


@utilities.rank_zero_only
def room_for(module: ContrastiveModule, trainer: L.Trainer, folder: Path) -> str:
    """What the checkpoints take of the disk, in words; refused where there is no room for the next one."""
    saving = next((one for one in trainer.checkpoint_callbacks if isinstance(one, checkpoints.Checkpoints)), None)
    if saving is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return ""
    for place in (saving.folder, saving.mean_folder, folder / display.METRICS.parent):
        files.require_writable(place)
    state, mean = (WIDTHS.get(trainer.precision, 1.0) * number for number in checkpoint_sizes(module))
    there = sum({file.stat().st_ino: file.stat().st_size for file in folder.glob("*/*.ckpt")}.values())
    # The older one goes once the newer is safe.
    what = f"the run's checkpoints take ({size(state + mean)} each, two at a time)"
    free = require_room(saving.folder, max(state + mean, 2 * (state + mean) - there), what)
    # The newest, the best, and one that is being written; of an EMA the newest is one.
    most = (saving.keep + 2) * state + 3 * mean
    advice = " Free space, or give --keep 1 or another --output." if most > free + there else ""
    kind = "Checkpoints with their EMA" if mean else "Checkpoints"
    return f" {kind} take {size(state + mean)} each, {size(most)} at most; {size(free)} are free.{advice}"


def checkpoint_sizes(module: ContrastiveModule) -> tuple[int, int]:
    """Bytes that a checkpoint will have, in float32 or half weights, and its EMA's own file."""
    numbers = module.options.optimizer
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)  # which may leave some out
    tensors = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, torch.Tensor)}
    state = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())  # what is shared once
    state -= 2 * sum(parameter.numel() for parameter in half_precision.to_narrow(module.model, numbers))
    of_matrix = 2 if numbers.adam_statistics == "bfloat16" else 4
    for group in build_optimizer(module, module.model, module.options).param_groups:
        moments = 2 if "betas" in group else bool(group["momentum"])  # of AdamW; of SGD and Muon
        state += moments * sum(one.numel() * (of_matrix if one.ndim >= 2 else 4) for one in group["params"])
    return state, sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("ema.model."))


@utilities.rank_zero_only
def say_end(trainer: L.Trainer, folder: Path, data: TextImageDataModule, best_by: str) -> None:
    """Name the output files, and the command that evaluates them."""
    print(f"Done after {trainer.global_step:,} steps. The output files are in {folder}/.")
    best, last = (folder / "checkpoints" / name for name in (checkpoints.BEST, checkpoints.LAST))
    if not last.is_file():
        return
    options = data.options
    if options.val_pairs is not None:
        options = replace(options, pairs=options.val_pairs, folder=None, shards=None, dataset=None, pair_by="stem")
    command = ["train-clip", "evaluate", str(best if best.is_file() else last)]
    for name in ("pairs", "shards", "dataset", "image_column", "caption_column", "folder", "pair_by"):
        if (value := getattr(options, name)) != getattr(DataOptions, name):
            command += [f"--{name}", str(value)]
    if data.validation_pairs:
        if options.val_pairs is None:
            command += ["--split", "held_out", "--val_share", str(options.val_share)]
        if best_by.startswith("val/") and "val/loss" not in trainer.callback_metrics:
            print(
                "The run ended before its first validation, so best.ckpt, if it exists, was not updated; "
                "--val_check_interval sets how often to validate."
            )
    print(f"Next: {shlex.join(command)}")
    say_mean(trainer, folder)


def say_mean(trainer: L.Trainer, folder: Path) -> None:
    """Name the EMA's best file, where it has scored better than the weights that were trained."""
    best = folder / "ema" / "best.ckpt"
    for saving in trainer.checkpoint_callbacks:
        if isinstance(saving, checkpoints.Checkpoints) and saving.mean_is_better and best.is_file():
            print(
                f"The EMA of the weights scored better: {saving.best_by} {saving.best['best_mean']:.4f}, the trained "
                f"weights {saving.best['best']:.4f}. To evaluate it, use {best} instead of the file above."
            )


def count(module: torch.nn.Module, trained: bool = False) -> int:
    """All numbers that the module's parameters hold, or those that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def settled(job: Job, run: RunOptions, folder: Path) -> dict[str, Any]:
    """Every option of the run, flat, in plain values; what was left open is as the module has it.

    A momentum that nobody asked for stays open, so that another optimizer beside that file has its own.
    """
    own = job.module.options.flat() | {"momentum": None}
    given = job.options | flat(replace(run, output=None, resume=None))
    if job.own_model is not None:
        given["model_name"] = folder / OWN_MODEL
    values = {name: own.get(name) if value is None else value for name, value in given.items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _num_steps(data: TextImageDataModule, trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run, as the Trainer's limits have it; infinity where they have none."""
    batches, limit = data.training_pairs.per_epoch // data.batch_size, trainer.limit_train_batches or 0
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 0)
    # -1 is no limit, as in the Trainer.
    return min((limit for limit in (by_epochs, trainer.max_steps) if limit >= 0), default=math.inf)
