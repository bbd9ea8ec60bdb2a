"""Lightning's Trainer for a run: its options, as they are here, and what it is built with."""

import copy
import inspect
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Union, get_args

import jsonargparse
import lightning as L
import torch
from lightning.pytorch import loggers

from train_clip import cores
from train_clip.commands import launcher
from train_clip.errors import UsageError
from train_clip.options import RunOptions, TrainerOptions
from train_clip.training import checkpoints, display, lightning_internals

# Options of the Trainer that are something else here than Lightning's documentation says.
HELP: dict[str, str | None] = {
    "max_epochs": None,  # --epochs
    "default_root_dir": None,  # --output
    "precision": "such as 32-true; default: bf16-mixed on a GPU with bfloat16, 16-mixed on others, 32-true on a CPU",
    "max_steps": "stop after this number of optimizer steps; default: as --epochs says",
    "logger": "a logger besides metrics.csv, such as WandbLogger; default: TensorBoardLogger. false: no logs at all",
    "log_every_n_steps": "optimizer steps between logged values; default: 10, or fewer in a run of less than 500 steps",
    "enable_checkpointing": "save checkpoints; default: true (--save_every and --keep say when and how many)",
    "enable_model_summary": "print Lightning's table of the model's layers; default: false",
    "use_distributed_sampler": "no effect: train-clip itself divides the batches among the processes",
}
EVALUATIONS = "train_clip.scores.while_training:build"
OWN_OPTIONS = {name for name, text in HELP.items() if text is None}


def default_precision(accelerator: Any) -> str:
    """bf16-mixed if the GPU supports it, otherwise 16-mixed; float32 without a CUDA device."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def add_options(parser: Any) -> None:
    """Add the arguments of Lightning's Trainer to a parser, but for those that have another name here."""
    # A class before a text, which every class's name would be.
    classes = {name: inspect.signature(L.Trainer).parameters[name] for name in ("accelerator", "strategy")}
    parser.add_class_arguments(L.Trainer, None, skip=OWN_OPTIONS | classes.keys(), instantiate=False)
    for name, one in classes.items():
        parser.add_argument(f"--{name}", type=Union[get_args(one.annotation)[::-1]], default=one.default)  # noqa: UP007


def build_trainer(options: TrainerOptions, folder: Path, run: RunOptions, best_by: str, first_step: int) -> L.Trainer:
    """Build Lightning's Trainer from plain values, with this package's callbacks and the user's."""
    with lightning_internals.told_in_a_line(UsageError, "Lightning's Trainer does not accept these options"):
        trainer = _build(options, folder, run, best_by, first_step)
    asked = options.get("strategy")
    strategy = asked["class_path"].rpartition(".")[2] if isinstance(asked, dict) else asked
    if lightning_internals.copies_this_process(trainer):
        raise UsageError(
            f"--strategy {strategy}: its processes are copies of this one, and their state does not return "
            "to it. Expected one that starts the command once for each device: --strategy ddp."
        )
    if lightning_internals.saves_folders(trainer):
        raise UsageError(
            f"--strategy {strategy}: its checkpoints would be folders of parts; expected files. Add "
            "--strategy.save_distributed_checkpoint false (ModelParallelStrategy) or --strategy.state_dict_type full "
            "(FSDPStrategy)."
        )
    if trainer.accumulate_grad_batches < 1:
        raise UsageError(f"--accumulate_grad_batches {trainer.accumulate_grad_batches}: expected 1 or above.")
    launcher.require_own_place(trainer)
    cores.share_threads(trainer.num_devices)
    return trainer


def _build(options: TrainerOptions, folder: Path, run: RunOptions, best_by: str, first_step: int) -> L.Trainer:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    # A copy, as jsonargparse changes what it is given.
    given = parser.instantiate(parser.parse_object(copy.deepcopy(dict(options))))
    asked = {name: value for name, value in given.as_dict().items() if value is not None}
    callbacks: list[L.Callback] = [display.Throughput(), display.Curves(folder)]
    if asked.get("enable_progress_bar", True):
        callbacks.append(display.RunProgress())
    if run.evaluate or run.best_by:
        callbacks += resolve_name(EVALUATIONS)(run.evaluate or [], run.evaluate_every, best_by)
    if asked.get("enable_checkpointing", True):
        interval = None if run.save_every is None else checkpoints.Interval.parse(str(run.save_every))
        callbacks.append(checkpoints.Checkpoints(folder / "checkpoints", interval, run.keep, best_by, folder / "ema"))
    logger = asked.get("logger", True)
    if logger is True:
        logger = loggers.TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_step or None)
    own = {
        "callbacks": callbacks + _listed(asked.get("callbacks", [])),
        "plugins": [checkpoints.AtomicCheckpointIO(), *_listed(asked.get("plugins", []))],
        # CSV always, for the curves.
        "logger": logger is not False and [display.MetricsLog(folder, first_step), *_listed(logger)],
        "enable_progress_bar": False,
        "max_epochs": run.epochs,
        "default_root_dir": folder,
    }
    return L.Trainer(**{"enable_model_summary": False} | asked | own)


def _listed(asked: Any) -> list[Any]:
    return asked if isinstance(asked, list) else [asked]
