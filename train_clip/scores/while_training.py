"""Evaluates a model while it trains, on any data, with whatever `evaluate` has: a callback of the Trainer."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from train_clip.checkpoints.load import Pretrained
from train_clip.commands import evaluate
from train_clip.data.table import READERS
from train_clip.errors import UsageError, UserError
from train_clip.evaluation import zero_shot
from train_clip.files import read_yaml
from train_clip.training import lightning_internals
from train_clip.training.checkpoints import Checkpoints
from train_clip.training.encode import WeightSubstitutes

FOLDERS = {field.name for field in fields(evaluate.ScoreOptions) if "Path" in str(field.type)}
NOT_HERE = {"json", "device"}  # options of `evaluate` that a run has its own of, or that mean nothing within it
# What figures are called where they are logged.
LOGGED = {"zero-shot top-": "top", "zero-shot ": "", "multi-label ": "", "i→t": "image_to_text", "t→i": "text_to_image"}


class Evaluations(Callback):
    """Scores a run's model, and the EMA of its weights, on further data, and logs ``NAME/FIGURE``.

    Each process embeds its share, each example once; ``best.ckpt`` may go by any of the figures (``best_by``).

    Args:
        sources: data by name: a folder, a table, or a YAML file of `evaluate`'s options, with paths as in a command.
        every: "2" or "2 epochs", or "500 steps" of the optimizer; the end of the run too.
        best_by: what best.ckpt goes by, to be found among the figures where it begins with one of the names.
    """

    def __init__(self, sources: dict[str, str], every: str = "1", best_by: str = "") -> None:
        found = re.fullmatch(r"([1-9]\d*)\s*(epochs?|steps?|)", every.strip())
        if not found:
            raise UsageError(f"--evaluate_every {every}: expected epochs, such as 2, or steps, such as '500 steps'.")
        self.every, self.in_steps = int(found[1]), found[2].startswith("step")
        self.sources, self.best_by = {name: _options(name, source) for name, source in sources.items()}, best_by
        for options in self.sources.values():
            # What is wrong with it is found before training.
            paths = [pair.image for pair in evaluate.find(options)]
            evaluate.label_sets(paths, zero_shot.read_list(options.classes) if options.classes else [], options)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if lightning_internals.steps_and_ends(trainer) == (True, False) and (
            trainer.global_step == trainer.max_steps or (self.in_steps and trainer.global_step % self.every == 0)
        ):
            self._evaluate(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not lightning_internals.steps_and_ends(trainer)[1]:
            return
        done = trainer.global_step if self.in_steps else trainer.current_epoch + 1
        is_last = trainer.global_step == trainer.max_steps or trainer.current_epoch + 1 == trainer.max_epochs
        if is_last or done % self.every == 0:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, module: Any) -> None:
        figures = dict[str, float]()
        ema = getattr(module, "ema", None)
        models = {"": module.model} | ({} if ema is None else {"_ema": ema.model})
        # The loaders draw a seed that nothing depends on.
        with torch.random.fork_rng(devices=[]):
            for name, options in self.sources.items():
                for suffix, model in models.items():
                    found = self._score(module, model, options)
                    figures |= {f"{name}{suffix}/{logged(figure)}": value for figure, value in found.items()}
                    if trainer.is_global_zero:
                        shown = "  ".join(f"{figure.removeprefix('zero-shot ')} {v:.1%}" for figure, v in found.items())
                        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
                        print(f"{where}, {name}{', EMA' * bool(suffix)}:  {shown}", flush=True)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures | {"epoch": trainer.current_epoch + 1.0}, step=trainer.global_step)
        if self.best_by not in figures and self.best_by.partition("/")[0].removesuffix("_ema") in self.sources:
            raise UserError(f"--best_by {self.best_by}: not among the figures. Expected one of {', '.join(figures)}.")
        for saving in trainer.checkpoint_callbacks:
            if isinstance(saving, Checkpoints):
                saving.note(figures)

    def _score(self, module: Any, model: Any, options: evaluate.ScoreOptions) -> dict[str, float]:
        has_half_weights = module.options.optimizer.has_half_weights and model is module.model
        with WeightSubstitutes(model, has_half_weights).in_place():
            whole = Pretrained(model, None, module.tokenizer)  # type: ignore[arg-type]
            return evaluate.figures(evaluate.run_evaluators(evaluate.collect(whole, options, lambda some, _: some)))


def logged(figure: str) -> str:
    """A figure's name in logs, and for ``--best_by``: "R@1 i→t" is R@1_image_to_text."""
    for shown, name in LOGGED.items():
        figure = figure.replace(shown, name)
    return figure.replace(" ", "_")


def build(given: list[str] | str, every: int | str, best_by: str) -> Evaluations:
    """The callback of ``--evaluate NAME=SOURCE``."""
    sources = dict[str, str]()
    for one in [given] if isinstance(given, str) else given:
        name, equals, source = one.partition("=")
        if not (re.fullmatch(r"\w[\w.-]*", name) and equals and source) or name in {
            "train",
            "val",
            "val_ema",
            *sources,
        }:
            raise UsageError(
                f"--evaluate {one}: expected NAME=SOURCE, each name once and none of train, val, val_ema; the source "
                "is a folder, a table, or a YAML file of `train-clip evaluate`'s options."
            )
        sources[name] = source
    return Evaluations(sources, str(every), best_by)


def _options(name: str, source: str) -> evaluate.ScoreOptions:
    path = Path(source)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return evaluate.ScoreOptions.pick({"pairs" if path.suffix.lower() in READERS else "folder": path})
    content: dict[str, Any] = read_yaml(path, "options of `train-clip evaluate`, a line NAME: VALUE for each")
    if unknown := content.keys() - {one.name for one in fields(evaluate.ScoreOptions)} | content.keys() & NOT_HERE:
        raise UserError(f"{path}: {', '.join(sorted(unknown))}: no options of `--evaluate {name}`.")
    return evaluate.ScoreOptions.pick({key: Path(v) if key in FOLDERS and v else v for key, v in content.items()})
