"""A folder or table of images, captions and classes → a ``Collection``: found, read, embedded.

Of several processes each embeds a share, and all have the whole.
"""

import dataclasses
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from train_clip import gather
from train_clip.data import pairs, samples, scan
from train_clip.errors import BadSample, UserError
from train_clip.evaluation import embed, zero_shot
from train_clip.models.clip import DualEncoder, Texts
from train_clip.options import BELOW_ONE, PairOptions, SourceOptions, at_least, option
from train_clip.printing import printable

COLUMN = "train_clip.scores.columns:label_sets"

Tokenize = Callable[[list[str]], Texts]
Progress = Callable[[DataLoader[Any], str], Iterator[Any]]
"""Goes through the batches of a loader, whose items are so called, and shows how far it is."""


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


def find(options: ScoreOptions) -> tuple[list[pairs.Pair], list[str]]:
    """The images that are to be scored, with their captions; and what is left out, in lines."""
    found = scan.scan_source(options.folder, options)
    if options.classes is None or found.faults:
        found.require_pairs()
    chosen, lone_images = list(found.pairs), found.lone_images
    if options.split != "all":
        chosen = list(pairs.split_pairs(found.pairs, options.val_share)[options.split == "held_out"])
    elif options.classes is not None:
        # To be classified an image needs no caption.
        chosen += [pairs.Pair(posixpath.join(found.pairs.root, image)) for image in lone_images]
        lone_images = []
    if not chosen:
        raise UserError(f"{found.source}: no images to score in the split {options.split!r}. Try --split all.")
    lone = {"images have no caption": lone_images, "captions have no image": found.lone_captions}
    named = {what: names for what, names in lone.items() if names}
    return chosen, [f"{len(names):,} {what}, such as {printable(names[0])}." for what, names in named.items()]


def collect(
    model: DualEncoder, tokenize: Tokenize, found: Sequence[pairs.Pair], options: ScoreOptions, progress: Progress
) -> embed.Collection:
    """Embed the images that were found, those of them that can be read, their captions and classes."""
    classes, templates = read_classes(options)
    require_different(model, tokenize, classes, templates, options.classes)
    # Before anything is embedded: an image of no class is refused.
    labels = label_sets([pair.image for pair in found], classes, options)
    device, (rank, processes) = model.logit_scale.device, gather.world()
    own, skips = range(len(found))[rank::processes], list[samples.Skip]()
    # Filled batch by batch: parts that are joined in the end would take the memory twice.
    images = torch.zeros(len(found), model.embed_dim, device=device)
    there = torch.zeros(len(found), dtype=torch.long, device=device)
    paths = [found[place].pixels for place in own]
    loader = samples.image_loader(paths, model.image_size, options.batch_size, options.num_workers)
    for indices, pixels, bad in progress(loader, "images"):
        places = [own[index] for index in indices]
        images[places], there[places] = embed.embed_images(model, pixels, options.batch_size).float(), 1
        skips += bad
    images, kept = gather.total(images), gather.total(there).nonzero().flatten().tolist()
    if not kept:
        first = skips[0] if skips else samples.Skip(found[0].pixels, "is not an image that can be read")
        raise UserError(f"{printable(first.path)}: {first.reason}; none of the {len(found):,} images can be read.")
    images = images if len(kept) == len(found) else images[kept]
    paths = [found[place].image for place in kept]
    embed.require_finite(images, paths, "images")
    captions, owners = list[str](), list[int]()
    for owner, pair in enumerate(found[place] for place in kept):
        if pair.caption or pair.texts:
            try:
                captions += pair.captions()
            except BadSample as bad:
                skips.append(samples.Skip(bad.path, bad.reason))
            owners += [owner] * (len(captions) - len(owners))
    own = range(len(captions))[rank::processes]
    texts = torch.zeros(len(captions), model.embed_dim, device=device)
    ids = torch.zeros(len(captions), dtype=torch.long, device=device)
    batches: Any = DataLoader(own, options.batch_size, collate_fn=list)  # type: ignore[arg-type]
    for places in progress(batches, "captions"):
        batch = [captions[place] for place in places]
        texts[places] = embed.embed_texts(model, batch, tokenize).float()
        ids[places] = model.caption_ids(tokenize(batch)).to(device)
    texts, ids = gather.total(texts), gather.total(ids)
    embed.require_finite(texts, captions, "captions")
    # By all images: which of them can be read does not change what is scored.
    several = any(len(of_image) > 1 for of_image in labels)
    labels = [labels[place] for place in kept] if classes else []
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
        embed_texts=lambda some: embed.embed_texts(model, some, tokenize),
        skips=skips,
        label_sets=labels if several else [],
    )


def label_sets(paths: list[str], classes: list[str], options: ScoreOptions) -> list[list[int]]:
    """The classes of each image, as places in their list; none at all where nothing is to be classified."""
    if options.class_column is not None:
        sets: list[list[int]] = resolve_name(COLUMN)(paths, classes, options)
        return sets
    return zero_shot.label_sets(paths, classes, zero_shot.class_names) if classes else []


def read_classes(options: Any) -> tuple[list[str], list[str]]:
    """Read the files of classes and of templates that options name."""
    classes = zero_shot.read_list(options.classes) if options.classes else []
    templates = zero_shot.read_list(zero_shot.templates_file(options.templates)) if options.templates else []
    for number, template in enumerate(templates, 1):
        if "{}" not in template:
            raise UserError(f"{options.templates}, line {number}: {template!r} has no {{}} for the class name.")
    if len(classes) == 1:
        raise UserError(f"{options.classes}: 1 class. Expected at least 2, from which the model is to choose.")
    return classes, templates or list(zero_shot.DEFAULT_TEMPLATES)


def require_different(
    model: DualEncoder, tokenize: Tokenize, classes: list[str], templates: list[str], source: Path | None
) -> None:
    """Refuse classes out of a file that are one to the model: those whose captions have the same tokens."""
    first = dict[int, str]()
    for start in range(0, len(classes), zero_shot.CAPTIONS_AT_ONCE):
        names = classes[start : start + zero_shot.CAPTIONS_AT_ONCE]
        ids = model.caption_ids(tokenize([templates[0].replace("{}", name) for name in names])).tolist()
        for name, number in zip(names, ids, strict=True):
            if (other := first.setdefault(number, name)) != name:
                raise UserError(
                    f"{source}: {other!r} and {name!r} have the same tokens, so they are one class to the model. "
                    "Expected classes that differ within the model's context length."
                )
