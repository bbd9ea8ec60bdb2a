"""Merge a fine-tuned model with the one that it started from, to keep more of what that one knew.

Weight-space ensembling of the start and the end of a fine-tuning run (WiSE-FT, Wortsman et al., arXiv 2109.01903).
"""

import dataclasses
import time
from pathlib import Path

import torch

from train_clip.checkpoints import found, own, state_dicts
from train_clip.commands import evaluate
from train_clip.commands.progress import FIRST_SECONDS
from train_clip.errors import UsageError, UserError
from train_clip.estimates import remaining, require_room
from train_clip.evaluation.collect import ScoreOptions
from train_clip.files import require_new, require_no_others, require_place
from train_clip.models.config import config_from_dict
from train_clip.options import option
from train_clip.training import checkpoints, same_run

Tensors = dict[str, torch.Tensor]

OF_LOSS = ("logit_scale", "logit_bias")
# What a merged checkpoint takes over from the tuned one besides its weights.
KEPT = (own.LIGHTNING, "epoch", "global_step", "hyper_parameters")


@dataclasses.dataclass(frozen=True)
class MergeOptions(ScoreOptions):
    """The weights of the two models, and what to evaluate the merged models on."""

    weight: float | list[float] = option(0.5, 'weight of the second checkpoint, 0 to 1; several as "[0.25, 0.5, 0.75]"')
    output: Path = option(Path("merged"), "folder for merged-WEIGHT.ckpt")
    other_folder: Path | None = option(None, "second folder to evaluate on, with data that the model knew before")
    other_classes: Path | None = option(None, "like --classes, for --other_folder")
    other_templates: Path | None = option(None, "like --templates, for --other_folder")


def merge(start: str, tuned: Path, /, options: MergeOptions) -> list[Path]:
    """Interpolate between a checkpoint and its fine-tuned version, and compare the scores.

    Args:
        start: the model before fine-tuning: a checkpoint, or any weights that `evaluate` reads
        tuned: the fine-tuned checkpoint
        options: the weights, and what to evaluate on.

    Returns:
        The files; none was written where two models are not one, a file is there already, or one cannot be scored.
    """
    weights = _weights(options)
    targets = [options.output / f"merged-{weight:g}.ckpt" for weight in weights]
    require_new(*targets)
    require_no_others(options.output, "merged-*.ckpt")
    end = own.read_checkpoint(tuned)
    arguments, state = end.get("hyper_parameters"), end.get("state_dict", {})
    second = {name.removeprefix(own.MODEL): value for name, value in state.items() if name.startswith(own.MODEL)}
    if not second or arguments is None or "backbone" in arguments:
        raise UserError(
            f"{tuned}: does not hold a model of this package. Expected a checkpoint of `train-clip train` "
            "or `finetune`."
        )
    about = {name: end[name] for name in KEPT if name in end} | {"hyper_parameters": {**arguments, **own.OF_RUN}}
    del end  # with the optimizer's state, twice as large as the weights
    if "config" in arguments:
        # The start is of the tuned model's configuration, whatever its file leaves open.
        begin: found.Found = found.find_model(start, config_from_dict(arguments["config"], start))
    else:
        begin = found.find_weights(start)
    first = of_one_loss(state_dicts.renamed(begin.read(), second), second)
    # Before anything is written: what cannot be mixed or scored leaves no files behind, which would be in the next
    # run's way.
    require_one_model(first, second)
    found.require_finite(first, begin.source)
    found.require_finite(second, str(tuned))
    require_room(options.output, len(weights) * sum(one.nbytes for one in second.values()), "the merged models take")
    started = time.perf_counter()
    scores = {weight: _scores(one, options) for weight, one in ((0.0, begin), (1.0, found.find_weights(tuned)))}
    # The two that there are already took as long as any two others.
    left = (time.perf_counter() - started) / 2 * len({*weights} - {0.0, 1.0})
    if left >= FIRST_SECONDS:
        print(f"The merged models are scored likewise: {remaining(left)}")
    if options.json is not None:
        require_place(options.json)
    for weight, target in zip(weights, targets, strict=True):
        merged = {own.MODEL + name: value for name, value in interpolate(first, second, weight).items()}
        checkpoints.AtomicCheckpointIO().save_checkpoint(about | {"state_dict": merged}, target)
        if weight not in scores:
            scores[weight] = _scores(found.find_weights(target), options)
    scores = dict(sorted(scores.items()))
    if options.json is not None and scores[0.0]:
        evaluate.write_json(options.json, {f"{weight:g}": of_one for weight, of_one in scores.items()})
    for weight, target in zip(weights, targets, strict=True):
        print(f"Wrote {target}: {1 - weight:g} × {start} + {weight:g} × {tuned}.")
    _report(scores)
    return targets


def interpolate(start: Tensors, tuned: Tensors, weight: float) -> Tensors:
    """The line between two state dicts of the same names and shapes (``require_one_model``).

        θ = (1 - w) θ_start + w θ_tuned

    Running statistics of BatchNorm lie on the line too; whole numbers, such as their counts of batches, are the tuned
    model's, and so are the dtypes. At w = 0 and 1 the tensors are the one's and the other's, bit for bit.
    """
    merged = {}
    for name, end in tuned.items():
        wide = torch.promote_types(end.dtype, torch.float32)
        between = start[name].to(wide).lerp(end.to(wide), weight)  # which is exact at both ends
        merged[name] = between.to(end.dtype) if end.is_floating_point() else end.clone()
    return merged


def of_one_loss(start: Tensors, tuned: Tensors) -> Tensors:
    """The start with the tuned model's temperature and bias, where one was trained with the sigmoid loss alone.

    A temperature means another thing in each loss. Which caption fits best depends on neither of the two.
    """
    if ("logit_bias" in start) == ("logit_bias" in tuned):
        return start
    towers = {name: tensor for name, tensor in start.items() if name not in OF_LOSS}
    return towers | {name: tuned[name] for name in OF_LOSS if name in tuned}


def require_one_model(start: Tensors, tuned: Tensors) -> None:
    """Refuse state dicts whose names or shapes differ."""
    begun, ended = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (start, tuned))
    same_run.require_same(ended, begun, "The checkpoints are of two models (found {found}); expected two of one model.")


def _weights(options: MergeOptions) -> list[float]:
    weights = options.weight if isinstance(options.weight, list) else [options.weight]
    names = {f"{weight:g}" for weight in weights if 0 <= weight <= 1}
    if not names or len(names) < len(weights):
        raise UsageError(
            f"--weight {options.weight}: expected a number from 0, the first checkpoint, to 1, the second, or several "
            'that differ within six digits, which are in the file names: --weight "[0.25, 0.5]".'
        )
    if options.other_folder is None and (options.other_classes or options.other_templates):
        raise UsageError("--other_classes and --other_templates need --other_folder.")
    return weights


def _scores(weights: found.Found, options: MergeOptions) -> dict[str, evaluate.Scores]:
    """Scores by what a model is scored on; none where nothing is given."""
    other = dataclasses.replace(options, folder=options.other_folder, pairs=None, split="all", class_column=None)
    other = dataclasses.replace(other, classes=options.other_classes, templates=options.other_templates)
    sets = {str(place): how for how in (options, other) if (place := how.folder or how.pairs)}
    if not sets:
        return {}
    model = evaluate.load_for_scoring(weights, options.device)
    return {name: evaluate.score(model, how)[0] for name, how in sets.items()}


def _report(by_weight: dict[float, dict[str, evaluate.Scores]]) -> None:
    """Print a table for each set, a row a weight."""
    for name in by_weight[0.0]:
        print(f"\n{name}")
        rows = []
        for weight, scores in by_weight.items():
            figures = evaluate.figures(scores[name])
            rows.append([f"{weight:g}", *(f"{figure:.1%}" for figure in figures.values())])
        evaluate.print_table([["weight", *figures], *rows])
        for weight, scores in by_weight.items():
            if collapse := scores[name]["collapse"]:
                print(f"Weight {weight:g}: {collapse}")
