"""Evaluate a model on a folder, print the scores, and draw images next to the captions it finds most similar."""

import dataclasses
import json
import posixpath
import random
import textwrap
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from rich import console, table
from torch.utils.data import DataLoader

from train_clip.checkpoints.found import NO_CHOICE, Found, find_weights
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.progress import with_progress
from train_clip.data import crops, pairs, samples, scan
from train_clip.errors import BadSample, UsageError, UserError
from train_clip.estimates import size
from train_clip.evaluation import embed, zero_shot
from train_clip.files import replacing, write_text
from train_clip.options import BELOW_ONE, Check, PairOptions, SourceOptions, WeightOptions, at_least, option
from train_clip.printing import printable

# By its key in the report: a function of a ``Collection``; its result, if it applies, is a dataclass with ``rows()`` to
# print and ``figures()`` to compare; fields of ``repr=False`` are not written. A new one is a line here and a file of
# its own.
EVALUATORS = {
    "retrieval": "train_clip.evaluation.retrieval:score_captions",
    "zero_shot": "train_clip.evaluation.zero_shot:score_classes",
    "multi_label": "train_clip.scores.multi_label:score_label_sets",
}
# What an option asks for besides.
INTERVALS, BY, CONFUSION, COMPARISON, COLUMN = (
    f"train_clip.scores.{place}"
    for place in (
        "bootstrap:with_intervals",
        "subgroups:score_by",
        "confusion:write",
        "comparison:compare",
        "columns:label_sets",
    )
)
CALIBRATION = "train_clip.probes.calibrate:calibrate"
NAMED = 5  # files named on the screen; --json names all
LARGE = 1e9  # bytes of embeddings that are spoken of
IMAGES_DRAWN, COLUMNS = 18, 3
CAPTIONS_DRAWN = 3  # of each
WIDTH = 200  # characters, what the widest row of a table takes, and more than is drawn of a caption

# ``num_images``, ``num_captions``, each evaluator's result, ``collapse``: a line where the model maps all to one point,
# and ``skips``: files that could not be read.
Scores = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ScoreOptions(SourceOptions):
    """What to evaluate, and where to write the scores."""

    folder: Path | None = option(
        None,
        "images and captions that share a stem; for classification, images in folders named after their class or with "
        "a STEM.cls next to them (one class per line)",
    )
    classes: Path | None = option(None, "text file of class names, one per line: also do zero-shot classification")
    templates: Path | None = option(
        None,
        "text file of prompt templates with {} for the class name, one per line, or one of CLIP's sets: "
        f'{", ".join(zero_shot.TEMPLATES)}; default: "a photo of a {{}}."',
    )
    split: Literal["all", "training", "held_out"] = option(
        "all",
        "pairs to evaluate: all, or training or held_out as split by `train` with the same --val_share",
    )
    val_share: float = option(PairOptions.val_share, "fraction of the pairs that was held out", BELOW_ONE)
    batch_size: int = option(64, "images per batch", at_least(1))
    num_workers: int = option(0, "loader processes", at_least(0))
    device: str = option("auto", "cpu, cuda, or auto: cuda if available")
    class_column: str | None = option(
        None, "the column of the table (--pairs) that holds each image's class or classes"
    )
    json: Path | None = option(None, "file to write the scores to")


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
    if others:
        compared: Scores = resolve_name(COMPARISON)([checkpoint, *others], options, weights)
        return compared
    if options.by and options.pairs is None:
        raise UsageError(f"--by {options.by}: is a column of a table. Give the table by --pairs.")
    if options.confusion and options.classes is None:
        raise UsageError(f"--confusion {options.confusion}: needs the names of the classes (--classes).")
    model, source = load(checkpoint, options, weights)
    scores, collection = score(model, options)
    if options.by is not None:
        scores["by"] = resolve_name(BY)(scores, collection.paths, options)
    # What took long is on disk before it is shown, to a terminal that may be gone; and shown, whatever a picture meets.
    if options.json is not None:
        write_json(options.json, scores)
    try:
        if options.calibrate:
            scores["calibration"] = resolve_name(CALIBRATION)(model, source, collection, options)
        if options.confusion is not None:
            resolve_name(CONFUSION)(scores["zero_shot"], options.confusion)
        if options.picture is not None and collection.captions:
            draw_best_captions(collection, options.picture)
            print(f"Images next to their best captions: {options.picture}")
    finally:
        report(scores)
    return scores


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
    collection = collect(model, options)
    counts = {"num_images": len(collection.paths), "num_captions": len(collection.captions)}
    found = {name: resolve_name(INTERVALS)(result) for name, result in run_evaluators(collection).items()}
    return counts | found | {"collapse": embed.find_collapse(collection), "skips": collection.skips}, collection


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


def draw_best_captions(collection: embed.Collection, target: Path) -> None:
    """Draw a fixed random choice of images next to their best captions; correct ones are green with a tick."""
    # Imported here because it takes half a second; the object-oriented interface needs no display.
    from matplotlib.figure import Figure

    paths, captions = collection.paths, collection.captions
    ids = collection.caption_ids.tolist()
    own = set(zip(collection.owners, ids, strict=True))
    chosen = sorted(random.Random(0).sample(range(len(paths)), min(IMAGES_DRAWN, len(paths))))
    different = list({caption: place for place, caption in enumerate(ids)}.values())
    texts = collection.texts[different]
    best = (collection.images[chosen] @ texts.T).cpu().topk(min(CAPTIONS_DRAWN, len(different)), dim=1)
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 1.45 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 2] * COLUMNS)
    for panel in axes.flat:
        panel.axis("off")
    panels = iter(axes.flat)
    for image, values, indices in zip(chosen, best.values.tolist(), best.indices.tolist(), strict=True):
        next(panels).imshow(crops.read_picture(paths[image]).picture)
        beside = next(panels)
        for line, (value, index) in enumerate(zip(values, indices, strict=True)):
            caption = captions[different[index]]
            mark, colour = ("✓", "#12813a") if (image, ids[different[index]]) in own else (" ", "#555555")
            text = textwrap.fill(
                f"{value:.2f} {mark} {caption[:WIDTH]}", 41, subsequent_indent=" " * 10, max_lines=2, placeholder=" …"
            )
            # A dollar sign begins no formula.
            how = {"color": colour, "fontsize": 8, "verticalalignment": "top", "parse_math": False}
            beside.text(0, 0.88 - 0.34 * line, text, **how)
    with replacing(target) as file:
        figure.savefig(file, dpi=110, format="png")


def collect(model: Pretrained, options: ScoreOptions, progress: Any = with_progress) -> embed.Collection:
    """Embed what is to be scored; of several processes each embeds its share, and all have the whole."""
    classes, templates = read_classes(model, options)
    found = find(options)
    # Before anything is embedded: an image of no class is refused.
    labels = label_sets([pair.image for pair in found], classes, options)
    skips, kept = list[samples.Skip](), list[int]()
    own = embed.share(len(found))
    images = _room(model, len(own))
    loader = samples.image_loader(
        [found[place].pixels for place in own], model.model.image_size, options.batch_size, options.num_workers
    )
    for indices, pixels, bad in progress(loader, "images"):
        skips += bad
        images[len(kept) : len(kept) + len(indices)] = embed.embed_images(model.model, pixels, options.batch_size)
        kept += [own[index] for index in indices]
    images, kept = embed.of_all(images[: len(kept)], kept, len(found))
    if not kept:
        first = skips[0] if skips else samples.Skip(found[0].pixels, "is not an image that can be read")
        raise UserError(f"{printable(first.path)}: {first.reason}; none of the {len(found):,} images can be read.")
    paths = [found[index].image for index in kept]
    embed.require_finite(images, paths, "images")
    captions, owners = list[str](), list[int]()
    for place, pair in enumerate(found[index] for index in kept):
        if pair.caption or pair.texts:
            try:
                captions += pair.captions()
            except BadSample as bad:
                skips.append(samples.Skip(bad.path, bad.reason))
            owners += [place] * (len(captions) - len(owners))

    def embed_texts(texts: list[str]) -> torch.Tensor:
        return embed.embed_texts(model.model, texts, lambda batch: model.tokenizer.batch(batch)[0])

    memory = 4 * model.model.embed_dim * (len(kept) + len(captions))
    if memory >= LARGE and progress is with_progress:
        print(f"Embeddings of {len(kept):,} images and {len(captions):,} captions take {size(memory)} of memory.")
    own = embed.share(len(captions))
    mine: Any = [captions[place] for place in own]
    batches: Any = DataLoader(mine, options.batch_size, collate_fn=list)
    texts, ids = _room(model, len(own)), torch.empty(len(own), dtype=torch.long, device=images.device)
    for number, batch in enumerate(progress(batches, "captions")):
        rows = slice(number * options.batch_size, (number + 1) * options.batch_size)
        texts[rows], ids[rows] = embed_texts(batch), _caption_ids(model, batch)
    (texts, _), (ids, _) = (embed.of_all(rows, own, len(captions)) for rows in (texts, ids))
    embed.require_finite(texts, captions, "captions")
    labels = [labels[index] for index in kept] if classes else []
    several = any(len(of_image) > 1 for of_image in labels)
    return embed.Collection(
        paths=paths,
        images=images,
        captions=captions,
        texts=texts,
        owners=owners,
        caption_ids=ids,
        classes=classes,
        templates=templates,
        labels=[] if several else [of_image[0] for of_image in labels],
        embed_texts=embed_texts,
        skips=skips,
        label_sets=labels if several else [],
    )


def find(options: ScoreOptions) -> list[pairs.Pair]:
    """The images that are to be scored, with their captions."""
    found = scan.scan_source(options.folder, options)
    if options.classes is None or found.faults:
        found.require_pairs()
    chosen = list(found.pairs)
    if options.split != "all":
        chosen = list(pairs.split_pairs(found.pairs, options.val_share)[options.split == "held_out"])
    elif options.classes is not None:
        # To be classified an image needs no caption.
        chosen += [pairs.Pair(posixpath.join(found.pairs.root, image)) for image in found.lone_images]
    if not chosen:
        raise UserError(f"{found.source}: no images to score in the split {options.split!r}. Try --split all.")
    return chosen


def label_sets(paths: list[str], classes: list[str], options: ScoreOptions) -> list[list[int]]:
    """The classes of each image, as places in their list; none at all where nothing is to be classified."""
    if options.class_column is not None:
        sets: list[list[int]] = resolve_name(COLUMN)(paths, classes, options)
        return sets
    return zero_shot.label_sets(paths, classes, zero_shot.class_names) if classes else []


def read_classes(model: Pretrained, options: Any) -> tuple[list[str], list[str]]:
    """Read the files of classes and of templates that options name; classes that are one to the model are refused."""
    classes = zero_shot.read_list(options.classes) if options.classes else []
    templates = zero_shot.read_list(zero_shot.templates_file(options.templates)) if options.templates else []
    for number, template in enumerate(templates, 1):
        if "{}" not in template:
            raise UserError(f"{options.templates}, line {number}: {template!r} has no {{}} for the class name.")
    templates = templates or list(zero_shot.DEFAULT_TEMPLATES)
    if len(classes) == 1:
        raise UserError(f"{options.classes}: 1 class. Expected at least 2, from which the model is to choose.")
    if classes:
        named = [templates[0].replace("{}", name) for name in classes]
        batches: Any = DataLoader(named, zero_shot.CAPTIONS_AT_ONCE, collate_fn=list)  # type: ignore[arg-type]
        ids = torch.cat([_caption_ids(model, batch) for batch in batches]).tolist()
        first = dict(zip(reversed(ids), reversed(classes), strict=True))
        for name, number in zip(classes, ids, strict=True):
            if first[number] != name:
                raise UserError(
                    f"{options.classes}: {first[number]!r} and {name!r} have the same tokens, so they are one class to "
                    "the model. Expected classes that differ within the model's context length."
                )
    return classes, templates


def _room(model: Pretrained, number: int) -> torch.Tensor:
    # Filled batch by batch: parts that are joined in the end would take the memory twice.
    return torch.empty(number, model.model.embed_dim, device=model.model.logit_scale.device)


def _caption_ids(model: Pretrained, texts: list[str]) -> torch.Tensor:
    return model.model.caption_ids(model.tokenizer.batch(texts)[0])
