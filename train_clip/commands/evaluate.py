"""Evaluate a model on a folder or table, and print the scores."""

import dataclasses
import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from rich import console, table

from train_clip.checkpoints.found import NO_CHOICE, Found, find_weights
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.progress import with_progress
from train_clip.errors import UsageError
from train_clip.evaluation import embed
from train_clip.evaluation.collect import ScoreOptions, collect, find
from train_clip.files import require_place, write_text
from train_clip.options import Check, WeightOptions, option
from train_clip.printing import printable

# By its key in the report: a function of a ``Collection``; its result, if it applies, is a dataclass with ``rows()`` to
# print and ``figures()`` to compare; fields of ``repr=False`` are not written. A new one is a line here and a file of
# its own.
EVALUATORS = {
    "retrieval": "train_clip.evaluation.retrieval:score_captions",
    "zero_shot": "train_clip.evaluation.zero_shot:score_classes",
    "multi_label": "train_clip.scores.multi_label:score_label_sets",
}
# What goes with the scores.
NEEDS = "train_clip.scores.needs:say"
INTERVALS = "train_clip.scores.bootstrap:with_intervals"
GROUPS = "train_clip.scores.subgroups:read"
BY = "train_clip.scores.subgroups:score_by"
CONFUSION = "train_clip.scores.confusion:write"
COMPARISON = "train_clip.scores.comparison:compare"
PICTURE = "train_clip.scores.best_captions:draw"
CALIBRATION = "train_clip.probes.calibrate:calibrate"
OF_CALIBRATION = "train_clip.probes.calibrate:require"
NAMED = 5  # files named on the screen; --json names all
WIDTH = 200  # characters, what the widest row of a table takes

# ``num_images``, ``num_captions``, each evaluator's result, ``collapse``: a line where the model maps all to one point,
# ``left_out``: lines on images and captions without a partner, and ``skips``: files that could not be read.
Scores = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ScoreOptions):
    """What to evaluate, and where to write scores and pictures."""

    by: str | None = option(None, "column of the table (--pairs): also score the images of each of its values alone")
    confusion: Path | None = option(
        None,
        "CSV or PNG to write: images of each class by the class they are taken for",
        Check(lambda path: path.suffix.lower() in (".csv", ".png"), "a name that ends in .csv or .png"),
    )
    picture: Path | None = option(None, "PNG to write: images next to the captions that the model finds most similar")
    calibrate: bool = option(
        False, "find the similarity above which pairs match, and how probably, for `search` and `classify`"
    )
    min_precision: float = option(
        0.95,
        "for --calibrate: fraction of the pairs above that similarity that are to match",
        Check(lambda value: 0 < value < 1, "above 0 and below 1"),
    )
    backbone: str | None = option(
        None, "for visual prompts: path or name of their backbone; default: the one they were trained with"
    )


def evaluate(checkpoint: str, /, options: EvaluateOptions, weights: WeightOptions = NO_CHOICE, *others: str) -> Scores:
    """Evaluate a model: retrieval over captions, and zero-shot classification over class names.

    Args:
        checkpoint: a checkpoint or a run's folder (its best checkpoint), or weights of OpenAI (ViT-B/32), open_clip or
            Hugging Face: a file, a folder, or hf-hub:NAME
        options: what to evaluate
        weights: values that they do not state
        others: further models, to be compared with the first on the same images
    """
    for target in (options.json, options.confusion, options.picture):
        if target is not None:
            require_place(target)
    if others:
        compared: Scores = resolve_name(COMPARISON)([checkpoint, *others], options, weights)
        return compared
    if options.confusion and options.classes is None:
        raise UsageError(f"--confusion {options.confusion}: needs the names of the classes (--classes).")
    groups = resolve_name(GROUPS)(options) if options.by is not None else {}
    model, source = load(checkpoint, options, weights)
    if options.calibrate:
        resolve_name(OF_CALIBRATION)(source, options)
    scores, collection = score(model, options)
    if options.by is not None:
        scores["by"] = resolve_name(BY)(groups, scores, collection.paths, options.by)
    # What took long is on disk before it is shown, to a terminal that may be gone; and shown, whatever a picture meets.
    if options.json is not None:
        write_json(options.json, scores)
    try:
        _write_further(model, source, scores, collection, options)
    finally:
        report(scores)
    return scores


def _write_further(
    model: Pretrained, source: str, scores: Scores, collection: embed.Collection, options: EvaluateOptions
) -> None:
    if options.confusion is not None:
        resolve_name(CONFUSION)(collection, scores["zero_shot"], options.confusion)
    if options.picture is not None and collection.captions:
        resolve_name(PICTURE)(collection, options.picture)
        print(f"Images next to their best captions: {options.picture}")
    # Last, as too few images are refused here.
    if options.calibrate:
        scores["calibration"] = resolve_name(CALIBRATION)(model, source, collection, options)
        if options.json is not None:
            write_json(options.json, scores)


def load(checkpoint: str, options: EvaluateOptions, weights: WeightOptions) -> tuple[Pretrained, str]:
    """Load what is to be evaluated, and say where a run's folder has it; that file too."""
    found = find_weights(checkpoint, weights, options.backbone)
    if found.source != checkpoint:
        print(f"Evaluating {found.source}.")
    return load_for_scoring(found, options.device), found.source


def load_for_scoring(weights: Found, device: str) -> Pretrained:
    """Load weights onto a device: ``auto``, or what PyTorch calls it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not available here ({str(error).splitlines()[0]}). Try cpu.") from None
    loaded = weights.build()
    loaded.model.to(device)
    return loaded


def score(model: Pretrained, options: ScoreOptions) -> tuple[Scores, embed.Collection]:
    """Score a model on its device with every evaluator that applies; return the scores and what was scored."""
    found, left_out = find(options)
    resolve_name(NEEDS)(model, found, options)
    collection = collect(model.model, model.tokens, found, options, with_progress)
    counts = {"num_images": len(collection.paths), "num_captions": len(collection.captions)}
    results = {name: resolve_name(INTERVALS)(result) for name, result in run_evaluators(collection).items()}
    further = {"collapse": embed.find_collapse(collection), "left_out": left_out, "skips": collection.skips}
    return counts | results | further, collection


def run_evaluators(collection: embed.Collection) -> Scores:
    """The result of each evaluator, or None where it does not apply; without intervals."""
    return {name: resolve_name(place)(collection) for name, place in EVALUATORS.items()}


def figures(scores: Scores) -> dict[str, float]:
    """The scores that are compared with those of other models."""
    return {key: value for name in EVALUATORS if scores[name] for key, value in scores[name].figures().items()}


def report(scores: Scores) -> None:
    """Print the scores next to chance."""
    skips = scores["skips"]
    print(f"{scores['num_images']:,} images, {scores['num_captions']:,} captions, {len(skips):,} files not scored")
    for rows in (scores[name].rows() for name in (*EVALUATORS, "by", "calibration") if scores.get(name)):
        (print if isinstance(rows, str) else print_table)(rows)
    if scores["collapse"]:
        print(scores["collapse"])
    for line in scores["left_out"]:
        print(line)
    for path, reason in skips[:NAMED]:
        print(f"Not scored: {printable(path)}: {reason}")


def write_json(target: Path, scores: dict[str, Any]) -> None:
    """Write scores as JSON, dataclasses included."""
    write_text(target, json.dumps(scores, indent=2, default=_fields) + "\n")


def _fields(result: Any) -> dict[str, Any]:
    return {one.name: getattr(result, one.name) for one in dataclasses.fields(result) if one.repr}


def print_table(rows: list[list[str]]) -> None:
    """Print a heading and rows of figures, in a line each on any terminal: folded they cannot be read or piped."""
    printed = table.Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    for column in printed.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        printed.add_row(*row)
    console.Console(width=WIDTH, markup=False, color_system=None).print(printed)
