"""Score a model on a folder, print it, and draw images beside the captions that the model finds most similar."""

import dataclasses
import json
import posixpath
import random
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train_clip.checkpoints.found import NO_CHOICE, Found, Pretrained, find_weights
from train_clip.commands.progress import with_progress
from train_clip.data.crops import read_picture
from train_clip.data.pairs import read_captions, split_pairs
from train_clip.data.samples import Skip, image_loader
from train_clip.data.scan import scan_source
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.embed import EMBED_AT_ONCE, Collection, embed_images, embed_texts
from train_clip.evaluation.zero_shot import DEFAULT_TEMPLATES, image_labels
from train_clip.files import replacing, write_text
from train_clip.models.clip import texts_on
from train_clip.options import BELOW_ONE, PairOptions, SourceOptions, WeightOptions, at_least, option

IMAGES_SHOWN = 18
CAPTIONS_SHOWN = 3
COLUMNS = 3


def draw_best_captions(collection: Collection, target: Path) -> None:
    """Draw a fixed random choice of images beside their best captions; their own are green with a tick."""
    # Imported here because it takes half a second; the object-oriented interface needs no display.
    from matplotlib.figure import Figure

    paths, captions, owners = collection.paths, collection.captions, collection.owners
    chosen = sorted(random.Random(0).sample(range(len(paths)), min(IMAGES_SHOWN, len(paths))))
    different = list(dict.fromkeys(captions))
    texts = collection.texts[[captions.index(caption) for caption in different]]
    similarity = (collection.images[chosen] @ texts.T).cpu()
    values, places = similarity.topk(min(CAPTIONS_SHOWN, len(different)), dim=1)
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 1.45 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 2] * COLUMNS)
    for panel in axes.flat:
        panel.axis("off")
    panels = iter(axes.flat)
    for image, scores, best in zip(chosen, values.tolist(), places.tolist(), strict=True):
        next(panels).imshow(read_picture(paths[image]).picture)
        text_panel = next(panels)
        own = {caption for caption, owner in zip(captions, owners, strict=True) if owner == image}
        for line, (value, place) in enumerate(zip(scores, best, strict=True)):
            caption = different[place]
            mark, colour = ("✓", "#12813a") if caption in own else (" ", "#555555")
            # A dollar sign would begin a formula.
            wrapped = textwrap.wrap(textwrap.shorten(caption, 64, placeholder=" …").replace("$", r"\$"), 34)
            text_panel.text(
                0.0,
                0.88 - 0.34 * line,
                f"{value:.2f} {mark} " + "\n          ".join(wrapped),
                color=colour,
                fontsize=8,
                verticalalignment="top",
                transform=text_panel.transAxes,
            )
    with replacing(target) as beside:
        figure.savefig(beside, dpi=110, format="png")


# By its key in the report: a function of a ``Collection``; its result, if it applies, is a dataclass with ``rows()`` to
# print and ``figures()`` to compare. A new one is a line here and a file of its own.
EVALUATORS = {
    "retrieval": "train_clip.evaluation.retrieval:score_captions",
    "zero_shot": "train_clip.evaluation.zero_shot:score_classes",
}
NAMED = 5  # files named on the screen; --json names all

# ``num_images``, ``num_captions``, each evaluator's result, and ``skips``: files that could not be read.
Scores = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ScoreOptions(SourceOptions):
    """What to score, and where the figures go."""

    folder: Path | None = option(
        None,
        "images and captions that share a stem; for classification, images in folders named after their class or with "
        "a STEM.cls beside them",
    )
    classes: Path | None = option(None, "a text file of class names, one a line: also classify without training")
    templates: Path | None = option(
        None, 'a text file of captions with {} where the class goes, one a line; default: "a photo of a {}."'
    )
    split: Literal["all", "training", "held_out"] = option(
        "all",
        "which pairs to score; training and held_out as `train --val_share` of the same number splits the folder",
    )
    val_share: float = option(PairOptions.val_share, "the share that was held out", BELOW_ONE)
    batch_size: int = option(64, "images at a time", at_least(1))
    num_workers: int = option(0, "loader processes", at_least(0))
    device: str = option("auto", "cpu or cuda; auto for cuda where there is one")
    json: Path | None = option(None, "a file to write the figures to")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ScoreOptions):
    """What to score, and where figures and pictures go."""

    picture: Path | None = option(None, "a PNG to draw, images beside the captions that the model finds most similar")
    backbone: str | None = option(
        None, "of a checkpoint of visual prompts, where its backbone lies; default: where it lay"
    )


def evaluate(checkpoint: str, /, options: EvaluateOptions, weights: WeightOptions = NO_CHOICE) -> Scores:
    """Score a model: retrieval over captions, and zero-shot classification over class names.

    Args:
        checkpoint: what `train` or `finetune` wrote, or weights by OpenAI (ViT-B/32), open_clip or Hugging Face: a
            file, a folder, or hf-hub:NAME
        options: what to score
        weights: what they leave open
    """
    model = load_for_scoring(checkpoint, options.device, weights, options.backbone)
    scores, collection = score(model, options)
    report(scores)
    if options.json is not None:
        write_text(options.json, json.dumps(scores, indent=2, default=dataclasses.asdict) + "\n")
    if options.picture is not None and collection.captions:
        draw_best_captions(collection, options.picture)
        print(f"Images beside their best captions: {options.picture}")
    return scores


def load_for_scoring(
    source: str | Path | Found, device: str, choices: WeightOptions = NO_CHOICE, backbone: str | None = None
) -> Pretrained:
    """Load whatever ``load`` takes, or what was found there, onto a device: ``auto``, or what PyTorch calls it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available here ({str(error).splitlines()[0]}). Try cpu.") from None
    loaded = (source if isinstance(source, Found) else find_weights(source, choices, backbone)).build()
    loaded.model.to(device)
    return loaded


def score(model: Pretrained, options: ScoreOptions) -> tuple[Scores, Collection]:
    """Score a model, on its device, by every evaluator that applies; the figures, and what they are of."""
    collection = _collect(model, options)
    scores: Scores = {"num_images": len(collection.paths), "num_captions": len(collection.captions)}
    scores |= {name: resolve_name(place)(collection) for name, place in EVALUATORS.items()}
    return scores | {"skips": collection.skips}, collection


def figures(scores: Scores) -> dict[str, float]:
    """The figures that are set side by side with other models."""
    return {key: value for name in EVALUATORS if scores[name] for key, value in scores[name].figures().items()}


def report(scores: Scores) -> None:
    """Print the figures beside chance."""
    console = Console()
    console.print("{num_images:,} images, {num_captions:,} captions".format(**scores), highlight=False)
    for rows in (scores[name].rows() for name in EVALUATORS if scores[name]):
        if isinstance(rows, str):
            console.print(rows, highlight=False, soft_wrap=True)
        else:
            console.print(table(rows))
    for path, reason in scores["skips"][:NAMED]:
        console.print(f"Not scored: {path}: {reason}", highlight=False, soft_wrap=True)
    if len(scores["skips"]) > NAMED:
        console.print(f"… and {len(scores['skips']) - NAMED:,} more files that were not scored.", highlight=False)


def table(rows: Sequence[Sequence[str]]) -> Table:
    """A heading and rows of figures, for a console."""
    made = Table(rows[0][0], box=None, header_style="bold", pad_edge=False)
    for heading in rows[0][1:]:
        made.add_column(heading, justify="right")
    for row in rows[1:]:
        made.add_row(*row)
    return made


def _collect(model: Pretrained, options: ScoreOptions) -> Collection:
    classes, templates = _read_classes(options)
    scan = scan_source(options.folder, options)
    if not classes or scan.faults:
        scan.require_pairs()
    pairs = scan.pairs
    if options.split != "all":
        pairs = split_pairs(pairs, options.val_share)[options.split == "held_out"]
    # To be classified an image needs no caption.
    lone = scan.lone_images if classes and options.split == "all" else []
    paths = [pair.image for pair in pairs] + [posixpath.join(pairs.root, image) for image in lone]
    if not paths:
        raise UserError(f"{scan.source}: no images to score in the split {options.split!r}. Try --split all.")
    labels = image_labels(paths, classes) if classes else []
    skips: list[Skip] = []
    kept, images = _embed_images(model, [pair.pixels for pair in pairs] + paths[len(pairs) :], options, skips)
    captions: list[str] = []
    owners: list[int] = []
    for place, index in enumerate(kept):
        if index < len(pairs):
            try:
                captions += pairs[index].captions()
            except BadSample as bad:
                skips.append(Skip(bad.path, bad.reason))
            owners += [place] * (len(captions) - len(owners))
    return Collection(
        paths=[paths[index] for index in kept],
        images=images,
        captions=captions,
        texts=_embed_texts(model, captions, options.batch_size),
        owners=owners,
        classes=classes,
        templates=templates,
        labels=[labels[index] for index in kept] if classes else [],
        embed_texts=partial(_embed_texts, model),
        skips=skips,
    )


def _read_classes(options: ScoreOptions) -> tuple[list[str], list[str]]:
    templates = list(DEFAULT_TEMPLATES)
    if options.classes is None:
        return [], templates
    if options.templates is not None:
        templates = _read_lines(options.templates, "captions with {} where the class goes")
        if without := [template for template in templates if "{}" not in template]:
            raise UserError(f"{options.templates}: {without[0]!r} has no {{}} where the class would go.")
    return _read_lines(options.classes, "class names"), templates


def _read_lines(path: Path, holding: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. Expected {holding}, one a line.")
    try:
        return read_captions(str(path))
    except BadSample as bad:
        raise UserError(f"{path}: {bad.reason.replace('caption', 'file')}. Expected {holding}, one a line.") from None


@torch.no_grad()
def _embed_images(
    model: Pretrained, paths: Sequence[str], options: ScoreOptions, skips: list[Skip]
) -> tuple[list[int], Tensor]:
    loader = image_loader(paths, model.model.image_size, options.batch_size, options.num_workers)
    kept: list[int] = []
    parts: list[Tensor] = []
    for indices, pixels, bad in with_progress(loader, "batches of images"):
        skips += bad
        kept += indices
        if indices:
            parts.append(embed_images(model.model, pixels, options.batch_size))
    if not parts:
        raise UserError(f"{skips[0].path}: {skips[0].reason}; none of the {len(paths):,} images can be read.")
    return kept, torch.cat(parts)


def _embed_texts(model: Pretrained, captions: Sequence[str], batch_size: int = EMBED_AT_ONCE) -> Tensor:
    device = model.model.logit_scale.device
    return embed_texts(model.model, captions, lambda some: texts_on(device, model.tokenizer.batch(some)[0]), batch_size)
