"""Score a checkpoint.

Scores of a model on a folder: what ``evaluate`` prints, and what other verbs set side by side.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train_clip.checkpoints.found import NO_CHOICE, Found, find_weights
from train_clip.checkpoints.load import Pretrained, open_weights
from train_clip.commands.options import TableOptions, WeightOptions, require_least
from train_clip.commands.progress import with_progress
from train_clip.data.crops import read_picture
from train_clip.data.pairs import Pair, read_captions
from train_clip.data.samples import image_loader
from train_clip.data.source import scan_source
from train_clip.data.split import split_pairs
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.embed import EMBED_AT_ONCE, embed_images, embed_texts
from train_clip.evaluation.pictures import draw_best_captions
from train_clip.evaluation.retrieval import Retrieval, retrieval
from train_clip.evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShot, class_embeddings, image_labels, zero_shot
from train_clip.files import write_text
from train_clip.models.clip import texts_on
from train_clip.options import WeightOptions as Choices
from train_clip.types import Skip


@dataclass(frozen=True)
class ScoreOptions(TableOptions):
    """What to score, and where the figures go.

    Args:
        folder: images and captions that share a stem; for classification, images in folders named after their class or
            with a STEM.cls beside them
        classes: a text file of class names, one a line: also classify without training
        templates: a text file of captions with {} where the class goes, one a line, if not "a photo of a {}."
        split: which pairs to score; training and held_out as `train --val_share` of the same number splits the folder
        val_share: the share that was held out
        batch_size: images at a time
        num_workers: loader processes
        device: cpu or cuda; auto for cuda where there is one
        json: a file to write the figures to
    """

    folder: Path | None = None
    classes: Path | None = None
    templates: Path | None = None
    split: Literal["all", "training", "held_out"] = "all"
    val_share: float = 0.05
    batch_size: int = 64
    num_workers: int = 0
    device: str = "auto"
    json: Path | None = None

    def require_sense(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            UserError: there are some.
        """
        require_least(batch_size=(self.batch_size, 1), num_workers=(self.num_workers, 0))


@dataclass(frozen=True)
class Scores:
    """Figures as shares in [0, 1]; None for what was not asked or could not be.

    Args:
        num_images: images scored.
        num_captions: captions scored.
        retrieval: both ways, where there are captions.
        zero_shot: where classes were given.
        skips: files that could not be read, and so were not scored.
    """

    num_images: int
    num_captions: int
    retrieval: Retrieval | None
    zero_shot: ZeroShot | None
    skips: tuple[Skip, ...]


@dataclass
class Collection:
    """The images and captions that could be read, embedded.

    Args:
        paths: N images.
        images: (N, D) float32, unit norm.
        captions: M captions.
        texts: (M, D) float32, unit norm.
        owners: the image of each caption, as a place in ``paths``.
        labels: the class of each image; empty where no classes were given.
        skips: what could not be read.
    """

    paths: list[str]
    images: Tensor
    captions: list[str]
    texts: Tensor
    owners: list[int]
    labels: list[int]
    skips: list[Skip]


def score(model: Pretrained, options: ScoreOptions) -> tuple[Scores, Collection]:
    """Score a model: retrieval over captions, and zero-shot classification over class names.

    Args:
        model: on its device.
        options: what to score.

    Returns:
        The figures, and what they are of.

    Raises:
        UserError: a file that is missing or does not hold what it should.
    """
    classes, templates = read_classes(options)
    collection = collect(model, options, classes)
    scores = Scores(
        num_images=len(collection.paths),
        num_captions=len(collection.captions),
        retrieval=_retrieval(collection) if collection.captions else None,
        zero_shot=_zero_shot(model, collection, classes, templates) if classes else None,
        skips=tuple(collection.skips),
    )
    return scores, collection


def load_for_scoring(
    source: str | Path | Found, device: str, choices: Choices = NO_CHOICE, backbone: str | None = None
) -> Pretrained:
    """Load a model for scoring.

    Args:
        source: whatever ``load`` takes, or what was found there.
        device: ``auto``, or what PyTorch calls it.
        choices: what the file leaves open.
        backbone: of a checkpoint of visual prompts, where its backbone lies, if not where it lay.

    Raises:
        UserError: as ``load``, or there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not to be had here ({str(error).splitlines()[0]}). Try cpu.") from None
    loaded = open_weights(source if isinstance(source, Found) else find_weights(source, choices, backbone))
    loaded.model.to(device)
    return loaded


def collect(model: Pretrained, options: ScoreOptions, classes: list[str]) -> Collection:
    """Read and embed what the options name.

    Raises:
        UserError: nothing to score, or an image whose class is none of the classes.
    """
    scan = scan_source(options.folder, options.pairs, options.columns, options.pair_by)
    if options.classes is None or scan.faults:
        scan.require_pairs()
    pairs = scan.pairs
    if options.split != "all":
        training, held_out = split_pairs(pairs, options.val_share)
        pairs = training if options.split == "training" else held_out
    # To be classified an image needs no caption.
    lone = scan.lone_images if options.classes is not None and options.split == "all" else []
    paths = [pair.image for pair in pairs] + [posixpath.join(pairs.root, image) for image in lone]
    if not paths:
        raise UserError(f"{scan.source}: no images to score in the split {options.split!r}. Try --split all.")
    labels = image_labels(paths, classes) if classes else []
    skips: list[Skip] = []
    pixels = [pair.pixels for pair in pairs] + paths[len(pairs) :]
    kept, images = _embed_images(model, pixels, options, skips)
    captions, owners = [], []
    for place, index in enumerate(kept):
        if index < len(pairs):
            lines = _read_captions(pairs[index], skips)
            captions += lines
            owners += [place] * len(lines)
    texts = _embed_texts(model, captions, options.batch_size)
    kept_labels = [labels[index] for index in kept] if classes else []
    return Collection([paths[index] for index in kept], images, captions, texts, owners, kept_labels, skips)


def read_classes(options: ScoreOptions) -> tuple[list[str], list[str]]:
    """Read the class names and the templates; no names where none are asked for.

    Raises:
        UserError: a file that is missing or empty, or a template without ``{}``.
    """
    if options.classes is None:
        return [], []
    templates = list(DEFAULT_TEMPLATES)
    if options.templates is not None:
        templates = read_lines(options.templates, "captions with {} where the class goes")
        if without := [template for template in templates if "{}" not in template]:
            raise UserError(f"{options.templates}: {without[0]!r} has no {{}} where the class would go.")
    return read_lines(options.classes, "class names"), templates


def read_lines(path: Path, holding: str) -> list[str]:
    """Read a text file's lines, blank ones dropped.

    Args:
        path: UTF-8 text.
        holding: what the lines are, for the message.

    Raises:
        UserError: no such file, or nothing in it.
    """
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
    """The indices of the paths that could be read, and their (N, D) unit-norm embeddings."""
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
    """(N, D) unit-norm embeddings of captions."""
    device = model.model.logit_scale.device
    return embed_texts(model.model, captions, lambda some: texts_on(device, model.tokenizer.batch(some)[0]), batch_size)


def _read_captions(pair: Pair, skips: list[Skip]) -> list[str]:
    try:
        return pair.captions()
    except BadSample as bad:
        skips.append(Skip(bad.path, bad.reason))
        return []


def _retrieval(collection: Collection) -> Retrieval:
    device = collection.images.device
    places = {caption: place for place, caption in enumerate(dict.fromkeys(collection.captions))}
    ids = torch.tensor([places[caption] for caption in collection.captions], device=device)
    owners = torch.tensor(collection.owners, device=device)
    # An image whose captions could not be read has nothing to be found by.
    described, owners = torch.unique(owners, return_inverse=True)
    return retrieval(collection.images[described], collection.texts, owners, ids)


def _zero_shot(model: Pretrained, collection: Collection, classes: Sequence[str], templates: Sequence[str]) -> ZeroShot:
    labels = torch.tensor(collection.labels, device=collection.images.device)
    return zero_shot(
        collection.images, labels, class_embeddings(classes, templates, lambda captions: _embed_texts(model, captions))
    )


NOTHING_CHOSEN = WeightOptions()
IMAGES_IN_PICTURE = 18
NAMED = 5  # files named on the screen; --json names all


@dataclass(frozen=True)
class EvaluateOptions(ScoreOptions):
    """What to score, and where figures and pictures go.

    Args:
        picture: a PNG to draw, images beside the captions that the model finds most similar
        backbone: of a checkpoint of visual prompts, where its backbone lies, if not where it lay
    """

    picture: Path | None = None
    backbone: str | None = None


def evaluate(checkpoint: str, /, options: EvaluateOptions, weights: WeightOptions = NOTHING_CHOSEN) -> Scores:
    """Score a model: retrieval over captions, and zero-shot classification over class names.

    Args:
        checkpoint: what `train` or `finetune` wrote, or weights by OpenAI (ViT-B/32), open_clip or Hugging Face: a
            file, a folder, or hf-hub:NAME
        options: what to score.
        weights: what they leave open.

    Returns:
        The figures, which are printed too.

    Raises:
        UserError: a file that is missing or does not hold what it should.
    """
    options.require_sense()
    model = load_for_scoring(checkpoint, options.device, weights.choices, options.backbone)
    scores, collection = score(model, options)
    report(scores)
    if options.json is not None:
        write_text(options.json, json.dumps(dataclasses.asdict(scores), indent=2) + "\n")
    if options.picture is not None and collection.captions:
        _draw(collection, options.picture)
    return scores


def report(scores: Scores) -> None:
    """Print the figures beside chance."""
    console = Console()
    console.print(f"{scores.num_images:,} images, {scores.num_captions:,} captions", highlight=False)
    if scores.retrieval is not None:
        table = Table("retrieval", box=None, header_style="bold", pad_edge=False)
        for heading in ("image → text", "chance", "text → image", "chance"):
            table.add_column(heading, justify="right")
        found = scores.retrieval
        for k in found.image_to_text:
            columns = (found.image_to_text, found.chance_image_to_text, found.text_to_image, found.chance_text_to_image)
            table.add_row(f"R@{k}", *(f"{column[k]:.1%}" for column in columns))
        console.print(table)
    if scores.zero_shot is not None:
        result = scores.zero_shot
        console.print(
            f"zero-shot over {result.num_classes} classes: top-1 {result.top1:.1%} (chance {result.chance:.1%}), top-5 "
            f"{result.top5:.1%}, mean per class {result.mean_per_class:.1%}",
            highlight=False,
            soft_wrap=True,
        )
    for skip in scores.skips[:NAMED]:
        console.print(f"Not scored: {skip.path}: {skip.reason}", highlight=False, soft_wrap=True)
    if len(scores.skips) > NAMED:
        console.print(f"… and {len(scores.skips) - NAMED:,} more files that were not scored.", highlight=False)


def _draw(collection: Collection, target: Path) -> None:
    """Draw a fixed random choice of images beside their best captions."""
    number = min(IMAGES_IN_PICTURE, len(collection.paths))
    chosen = sorted(random.Random(0).sample(range(len(collection.paths)), number))
    different = list(dict.fromkeys(collection.captions))
    places = torch.tensor([collection.captions.index(caption) for caption in different])
    similarity = (collection.images[chosen] @ collection.texts.T).cpu()[:, places]
    own: dict[int, set[str]] = {index: set() for index in chosen}
    for caption, owner in zip(collection.captions, collection.owners, strict=True):
        if owner in own:
            own[owner].add(caption)
    pictures = [read_picture(collection.paths[index]).picture for index in chosen]
    draw_best_captions(pictures, different, similarity, [own[index] for index in chosen], target)
    print(f"Images beside their best captions: {target}")
