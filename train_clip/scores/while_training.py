"""Evaluates a model while it trains, on any data, with whatever `evaluate` has: a callback of the Trainer."""

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from train_clip import gather
from train_clip.commands import evaluate
from train_clip.data import pairs
from train_clip.data.table import READERS
from train_clip.errors import UsageError, UserError, first_line
from train_clip.evaluation import collect, zero_shot
from train_clip.evaluation.retrieval import KS, WAYS
from train_clip.files import read_yaml
from train_clip.scores import multi_label
from train_clip.training import lightning_internals
from train_clip.training.checkpoints import Checkpoints
from train_clip.training.encode import WeightSubstitutes

NOT_HERE = {"json", "device"}  # options of `evaluate` that a run has its own of, or that mean nothing within it
# What figures are called where they are logged.
LOGGED = {"zero-shot top-": "top", "zero-shot ": "", "multi-label ": "", "i→t": "image_to_text", "t→i": "text_to_image"}
OF_VALIDATION = ("loss", "loss_above_floor", "mean_recall", *(f"R@{k} {way}" for way in WAYS for k in KS))


class Evaluations(Callback):
    """Scores a run's model, and the EMA of its weights, on further data, and logs ``NAME/FIGURE``.

    Each process embeds its share, each example once; ``best.ckpt`` may go by any of the figures (``best_by``).

    Args:
        sources: data by name: a folder, a table, or a YAML file of `evaluate`'s options, with paths as in a command.
        every: "2" or "2 epochs", or "500 steps" of the optimizer; after the last epoch or step too.
        best_by: what best.ckpt goes by, to be found among the figures where it begins with one of the names.
    """

    def __init__(self, sources: dict[str, str], every: str = "1", best_by: str = "") -> None:
        found = re.fullmatch(r"([1-9]\d*)\s*(epochs?|steps?|)", every.strip())
        if not found:
            raise UsageError(f"--evaluate_every {every}: expected epochs, such as 2, or steps, such as '500 steps'.")
        self.every, self.in_steps, self.best_by = int(found[1]), found[2].startswith("step"), best_by
        self.sources = {name: _options(name, source) for name, source in sources.items()}
        # What is wrong with the data or a name is found before training.
        possible = {name: possible_figures(options) for name, options in self.sources.items()} | {"val": OF_VALIDATION}
        names = [f"{name}/{logged(figure)}" for name, figures in possible.items() for figure in figures]
        if best_by and best_by not in names:
            raise UsageError(f"--best_by {best_by}: no figure of this run. Expected one of {', '.join(names)}.")

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for options in self.sources.values():
            classes, templates = collect.read_classes(options)
            collect.require_different(pl_module.model, tokens(pl_module), classes, templates, options.classes)

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
                    try:
                        found = self._score(module, model, options)
                    except UserError as error:
                        if trainer.is_global_zero:
                            print(f"--evaluate {name}: not scored at step {trainer.global_step:,}. {error}", flush=True)
                        continue
                    figures |= {f"{name}{suffix}/{logged(figure)}": value for figure, value in found.items()}
                    if trainer.is_global_zero:
                        shown = "  ".join(f"{figure.removeprefix('zero-shot ')} {v:.1%}" for figure, v in found.items())
                        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
                        print(f"{where}, {name}{', EMA' * bool(suffix)}:  {shown}", flush=True)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures | {"epoch": trainer.current_epoch + 1.0}, step=trainer.global_step)
        scored = {figure.partition("/")[0] for figure in figures}
        if self.best_by not in figures and self.best_by.partition("/")[0] in scored:
            raise UserError(f"--best_by {self.best_by}: not among the figures. Expected one of {', '.join(figures)}.")
        for saving in trainer.checkpoint_callbacks:
            if isinstance(saving, Checkpoints):
                saving.note(figures)

    def _score(self, module: Any, model: Any, options: collect.ScoreOptions) -> dict[str, float]:
        has_half_weights = module.options.optimizer.has_half_weights and model is module.model
        with WeightSubstitutes(model, has_half_weights).in_place():
            collection = collect.collect(model, tokens(module), find(options), options, lambda loader, _: iter(loader))
            return evaluate.figures(evaluate.run_evaluators(collection))


def find(options: collect.ScoreOptions) -> list[pairs.Pair]:
    """The images of a source, or an error on every process: one that stopped alone would be waited for."""
    found, fault = list[pairs.Pair](), ""
    try:
        found, _ = collect.find(options)
        collect.read_classes(options)
    except UserError as error:
        fault = str(error)
    numbers, faults = zip(*gather.gather_objects((len(found), fault)), strict=True)
    if fault := next(filter(None, faults), ""):
        raise UserError(fault)
    if len(set(numbers)) > 1:
        raise UserError(f"{options.folder or options.pairs}: the processes found {numbers} images; expected the same.")
    return found


def tokens(module: Any) -> collect.Tokenize:
    """How a module tokenizes captions."""
    return lambda captions: module.tokenizer.batch(captions)[0]


def possible_figures(options: collect.ScoreOptions) -> list[str]:
    """The names of the figures that a source can have; it is refused where it can have none.

    Whether captions leave an image's R@k to be missed shows only when they have been read.
    """
    (images, _), (classes, _) = collect.find(options), collect.read_classes(options)
    labels = collect.label_sets([pair.image for pair in images], classes, options)
    described = sum(bool(pair.caption or pair.texts) for pair in images)
    figures = [f"R@{k} {way}" for way in WAYS for k in KS if described > (1 if way == "i→t" else k)]
    if max(map(len, labels), default=0) > 1:
        figures.append(multi_label.FIGURE)
    elif labels:
        figures += [zero_shot.TOP1, zero_shot.MEAN, zero_shot.TOP5][: 3 if len(classes) > 5 else 2]
    if not figures:
        raise UserError(
            f"{options.folder or options.pairs}: {len(images):,} images, {described:,} of them with captions, and no "
            "classes: nothing to score. Expected captions of several images, or classes."
        )
    return figures


def logged(figure: str) -> str:
    """A figure's name in logs, and for ``--best_by``: "R@1 i→t" is R@1_image_to_text."""
    for shown, name in LOGGED.items():
        figure = figure.replace(shown, name)
    return figure.replace(" ", "_")


def build(given: list[str] | str, every: int | str, best_by: str) -> list[Callback]:
    """The callback of ``--evaluate NAME=SOURCE``, if there are any; ``best_by`` is refused where no figure is it."""
    sources = dict[str, str]()
    for one in [given] if isinstance(given, str) else given:
        name, equals, source = one.partition("=")
        taken = name.endswith("_ema") or name in ("train", "val", *sources)
        if taken or not (re.fullmatch(r"\w[\w.-]*", name) and equals and source):
            raise UsageError(
                f"--evaluate {one}: expected NAME=SOURCE, each name once and none of train, val, nor one that ends "
                "in _ema; the source is a folder, a table, or a YAML file of `train-clip evaluate`'s options."
            )
        sources[name] = source
    evaluations = Evaluations(sources, str(every), best_by)
    return [evaluations] if sources else []


def _options(name: str, source: str) -> collect.ScoreOptions:
    path = Path(source)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return collect.ScoreOptions.pick({"pairs" if path.suffix.lower() in READERS else "folder": path})
    content: dict[str, Any] = read_yaml(path, "options of `train-clip evaluate`, a line NAME: VALUE for each")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    for one in fields(collect.ScoreOptions):
        if one.name not in NOT_HERE:
            parser.add_argument(f"--{one.name}", type=one.type, default=one.default)
    if unknown := sorted(map(str, content.keys() - parser.get_defaults().keys())):
        raise UserError(f"{path}: {', '.join(unknown)}: no options of `--evaluate {name}`.")
    try:
        return collect.ScoreOptions(**parser.parse_object(content).as_dict())
    except argparse.ArgumentError as error:
        raise UserError(f"{path}: {first_line(error)}. Expected options of `train-clip evaluate`.") from error
