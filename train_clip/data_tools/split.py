"""Divide pairs into tables for training, validation and test; what belongs together stays on one side."""

import csv
import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from train_clip.commands.progress import in_workers
from train_clip.data.crops import read_picture
from train_clip.data.images import reading
from train_clip.data.pairs import PairList
from train_clip.data.scan import scan_source
from train_clip.data.tokenizer import Tokenizer
from train_clip.data_tools.check import by_reason
from train_clip.data_tools.facts import perceptual_hash
from train_clip.data_tools.report import near_pairs
from train_clip.errors import BadSample, UsageError, UserError
from train_clip.evaluation.zero_shot import class_name
from train_clip.files import opened, replacing, require_new, require_no_others
from train_clip.models.clip import caption_ids, up_to_end
from train_clip.optional import optional
from train_clip.options import BELOW_ONE, PairOptions, SourceOptions, at_least, option
from train_clip.printing import no_formula, printable
from train_clip.scores.columns import values

NAMED = 3  # pairs in a message


@dataclass(frozen=True)
class SplitOptions(SourceOptions):
    """How to divide the pairs."""

    output: Path = option(Path("split"), "folder for train.csv, val.csv and test.csv")
    val_share: float = option(PairOptions.val_share, "fraction of the pairs for validation", BELOW_ONE)
    test_share: float = option(0.05, "fraction of the pairs for testing", BELOW_ONE)
    seed: int = option(0, "decides which")
    group: str | None = option(
        None, "keep pairs of one group on one side: a column of the table, such as patient, or folder, for the image's"
    )
    equal_captions: Literal["named", "together"] = option(
        "named", "captions that are equal to the model: name those on both sides, or keep their pairs together"
    )
    similar_images: Literal["ignored", "named", "together"] = option(
        "ignored", "images that look alike (perceptual hash, ImageHash): likewise"
    )
    max_per_class: int | None = option(
        None, "maximum number of pairs per class, named by STEM.cls next to the image or by its folder", at_least(1)
    )


def data_split(folder: Path | None = None, /, *, options: SplitOptions) -> dict[str, int]:
    """Divide pairs into tables for training, validation and test; equal images, and groups, stay on one side.

    The split depends only on the seed and the images' content, or the groups' names, not on other names or the machine.

    Args:
        folder: images and captions that share a stem; or give a table with --pairs
        options: how

    Returns:
        How many pairs each table holds.
    """
    if options.val_share + options.test_share >= 1:
        raise UserError(
            f"--val_share {options.val_share} and --test_share {options.test_share} leave nothing; expected their sum "
            "below 1."
        )
    tables = {part: options.output / f"{part}.csv" for part in ("train", "val", "test")}
    require_new(*tables.values())
    require_no_others(options.output)
    if options.similar_images != "ignored":
        optional("imagehash", "--similar_images")
    pairs = scan_source(folder, options).require_pairs().pairs
    groups_of(pairs, options)  # which refuses a column that is not there before any image is read
    pairs, looked, bad = _readable(pairs, options)
    groups = groups_of(pairs, options)
    classes = [class_name(Path(pair.image)) for pair in pairs] if options.max_per_class else []
    parts = divide(together(looked, groups, options), classes, options)
    for part, table in tables.items():
        write_table(table, ((pairs[place].image, pairs[place].captions()) for place in parts[part]))
    if bad:
        print("Left out:", *by_reason(bad), sep="\n")
    sizes = {part: len(places) for part, places in parts.items()}
    print(*(f"{tables[part]}: {size:,} pairs" for part, size in sizes.items()), sep="\n")
    print(*_on_both_sides(pairs, looked, parts, options), sep="\n", end="")
    if left_out := len(pairs) - sum(sizes.values()):
        print(f"{left_out:,} pairs left out by --max_per_class {options.max_per_class}.")
    validated = f" --val_pairs {tables['val']}"
    if sizes["val"] < 2:
        print(f"Too few pairs for {tables['val']} to be used for validation: it needs at least 2.")
        validated = ""
    print(f"Next: train-clip train --pairs {tables['train']}{validated}")
    return sizes


class Looked(NamedTuple):
    """What of a pair can be equal or alike in another."""

    content: bytes  # digest of the image's file
    captions: list[int]  # what each caption's tokens are known by
    look: int  # perceptual hash; 0 where nobody asks


def _readable(pairs: PairList, options: SplitOptions) -> tuple[PairList, list[Looked], dict[str, list[str]]]:
    """The pairs whose image file and captions can be read, what they are known by, and what cannot, by reason."""
    for pair in pairs:
        try:
            pair.image.encode()
        except UnicodeEncodeError:
            raise UserError(f"{pair.image}: its name is not UTF-8, so no table can hold it. Rename it.") from None
    there: dict[int, Looked] = {}
    bad: dict[str, list[str]] = defaultdict(list)
    look = partial(_look, pairs, Tokenizer(), options.similar_images != "ignored")
    for place, found in enumerate(in_workers(look, range(len(pairs)), None, "pairs")):
        if isinstance(found, BadSample):
            bad[found.reason].append(printable(found.path))
        else:
            there[place] = found
    return pairs.take(list(there)), list(there.values()), bad


def _look(pairs: PairList, tokens_of: Tokenizer, similar: bool, place: int) -> Looked | BadSample:
    pair, phash = pairs[place], perceptual_hash()
    try:
        with reading(pair.image, "image"), opened(pair.image) as file:
            content = hashlib.file_digest(file, "sha256").digest()
        tokens, _ = tokens_of.batch(pair.captions())
        captions = caption_ids(tokens, up_to_end(tokens)).tolist()
        return Looked(content, captions, phash(read_picture(pair.image).picture) if similar and phash else 0)
    except BadSample as bad:
        return bad


def groups_of(pairs: PairList, options: SplitOptions) -> list[list[str]]:
    """The groups that each pair is in: none, that of its folder, or what the column says."""
    if options.group is None:
        return [[]] * len(pairs)
    if options.pairs is None or options.group == "folder":
        if options.group != "folder":
            raise UsageError(f"--group {options.group}: is a column of a table. Expected --pairs, or --group folder.")
        return [[os.path.dirname(name)] for name in pairs.names]  # noqa: PTH120
    of_image = values(options, options.group, "--group")
    groups = [of_image.get(str(Path(pair.image)), []) for pair in pairs]
    if [] in groups:
        raise UserError(
            f"{pairs[groups.index([])].image}: has no group in the column {options.group!r}. Expected one in its rows."
        )
    return groups


def together(looked: list[Looked], groups: list[list[str]], options: SplitOptions) -> list[bytes]:
    """For each pair a digest that all have that stay on one side: the least of their groups', or of their images'."""
    root = list(range(len(looked)))

    def top(place: int) -> int:
        while root[place] != place:
            root[place] = place = root[root[place]]
        return place

    first: dict[Any, int] = {}
    for place, (one, own) in enumerate(zip(looked, groups, strict=True)):
        shared: list[Any] = [one.content, *own]
        shared += one.captions if options.equal_captions == "together" else []
        for what in shared:
            root[top(place)] = top(first.setdefault(what, place))
    if options.similar_images == "together":
        for place, other in _alike(looked):
            root[top(place)] = top(other)
    digests: dict[int, bytes] = {}
    for place, (one, own) in enumerate(zip(looked, groups, strict=True)):
        least = min(
            (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in own), default=one.content
        )
        digests[top(place)] = min(least, digests.get(top(place), least))
    return [digests[top(place)] for place in range(len(looked))]


def _alike(looked: list[Looked]) -> Iterator[tuple[int, int]]:
    """Places of images that look alike, each of those of one look with the first."""
    looks, first, look_of = np.unique([one.look for one in looked], return_index=True, return_inverse=True)
    yield from enumerate(first[look_of].tolist())
    for one, other in near_pairs(looks.view(np.uint64)):
        yield from zip(first[one].tolist(), first[other].tolist(), strict=True)


def _on_both_sides(
    pairs: PairList, looked: list[Looked], parts: dict[str, list[int]], options: SplitOptions
) -> Iterator[str]:
    """Lines on what validation and test share with training, where it is to be named."""
    trained = {one for place in parts["train"] for one in looked[place].captions}
    held_out = sorted(parts["val"] + parts["test"])
    shared = {"a caption": [place for place in held_out if trained.intersection(looked[place].captions)]}
    if options.similar_images == "named":
        # Of those of one look the first stands for all.
        looks = {place: one.look for place, one in enumerate(looked)}
        near: dict[int, set[int]] = defaultdict(set)
        for one, other in _alike(looked):
            near[looks[one]].add(looks[other])
            near[looks[other]].add(looks[one])
        there = {looks[place] for place in parts["train"]}
        shared["a similar image"] = [place for place in held_out if near[looks[place]] & there]
    for what, places in shared.items():
        if places:
            named = ", ".join(printable(pairs.names[place]) for place in places[:NAMED])
            yield f"{len(places):,} of {len(held_out):,} held-out pairs share {what} with training, such as {named}.\n"


def divide(keys: list[bytes], classes: list[str], options: SplitOptions) -> dict[str, list[int]]:
    """Divide pairs into ``train``, ``val`` and ``test``; those of one key stay together.

    Pairs are taken by a hash of the seed and their key; a class that is capped keeps the first. Test and validation
    hold the wanted number or, where a group does not fit, less.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    order = sorted(groups, key=lambda key: hashlib.sha256(b"%d:" % options.seed + key).digest())
    taken = [groups[key] for key in order]
    if (most := options.max_per_class) is not None:
        seen: dict[str, Iterator[int]] = defaultdict(itertools.count)
        taken = [[index for index in group if next(seen[classes[index]]) < most] for group in taken]
    total = sum(map(len, taken))
    room = {"test": round(options.test_share * total), "val": round(options.val_share * total), "train": total}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for group in taken:
        part = next(part for part, left in room.items() if len(group) <= left)
        room[part] -= len(group)
        parts[part] += group
    return {part: sorted(indices) for part, indices in parts.items()}


def write_table(table: Path, rows: Iterable[tuple[str, list[str]]]) -> None:
    """Write a CSV table, whole or not at all, of images and their captions; its folder is made.

    No cell begins as a formula does: a spreadsheet would run it. ``scan_table`` reads what stands before it as nothing.
    """
    here = os.path.realpath(table.parent)
    with replacing(table) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        # Lines end in CR LF, as RFC 4180 has it: only then is a name or caption that holds either put in quotes.
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for image, texts in rows:
            # Through links: ".." leads to the folder above the one that is linked to.
            place, name = os.path.split(image)
            name = Path(os.path.relpath(os.path.join(os.path.realpath(place), name), here)).as_posix()  # noqa: PTH118
            writer.writerows([no_formula(name, "./"), no_formula(text)] for text in texts)
