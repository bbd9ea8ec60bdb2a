"""Divide pairs into tables for training, validation and test."""

import csv
import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train_clip.commands.progress import in_workers
from train_clip.data.images import reading
from train_clip.data.pairs import PairList
from train_clip.data.scan import scan_source
from train_clip.data_tools.check import by_reason
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.zero_shot import class_name
from train_clip.files import opened, replacing, require_new, require_no_others
from train_clip.options import BELOW_ONE, PairOptions, SourceOptions, at_least, option
from train_clip.printing import no_formula, printable


@dataclass(frozen=True)
class SplitOptions(SourceOptions):
    """How to divide the pairs."""

    output: Path = option(Path("split"), "folder for train.csv, val.csv and test.csv")
    val_share: float = option(PairOptions.val_share, "fraction of the pairs for validation", BELOW_ONE)
    test_share: float = option(0.05, "fraction of the pairs for testing", BELOW_ONE)
    seed: int = option(0, "decides which")
    max_per_class: int | None = option(
        None, "maximum number of pairs per class, named by STEM.cls next to the image or by its folder", at_least(1)
    )


def data_split(folder: Path | None = None, /, *, options: SplitOptions) -> dict[str, int]:
    """Divide pairs into tables for training, validation and test; equal images stay on one side.

    The split depends only on the seed and the images' content, not on names or the machine.

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
    pairs, digests, bad = _readable(scan_source(folder, options).require_pairs().pairs)
    classes = [class_name(Path(pair.image)) for pair in pairs] if options.max_per_class else []
    parts = divide(digests, classes, options)
    for part, table in tables.items():
        write_table(table, ((pairs[place].image, pairs[place].captions()) for place in parts[part]))
    if bad:
        print("Left out:", *by_reason(bad), sep="\n")
    sizes = {part: len(places) for part, places in parts.items()}
    print(*(f"{tables[part]}: {size:,} pairs" for part, size in sizes.items()), sep="\n")
    if left_out := len(pairs) - sum(sizes.values()):
        print(f"{left_out:,} pairs left out by --max_per_class {options.max_per_class}.")
    validated = f" --val_pairs {tables['val']}"
    if sizes["val"] < 2:
        print(f"Too few pairs for {tables['val']} to be used for validation: it needs at least 2.")
        validated = ""
    print(f"Next: train-clip train --pairs {tables['train']}{validated}")
    return sizes


def _readable(pairs: PairList) -> tuple[PairList, list[bytes], dict[str, list[str]]]:
    """The pairs whose image file and captions can be read, a digest of each image, and what cannot, by reason."""
    for pair in pairs:
        try:
            pair.image.encode()
        except UnicodeEncodeError:
            raise UserError(f"{pair.image}: its name is not UTF-8, so no table can hold it. Rename it.") from None
    digests: dict[int, bytes] = {}
    bad: dict[str, list[str]] = defaultdict(list)
    for place, found in enumerate(in_workers(partial(_look, pairs), range(len(pairs)), None, "pairs")):
        if isinstance(found, BadSample):
            bad[found.reason].append(printable(found.path))
        else:
            digests[place] = found
    return pairs.take(list(digests)), list(digests.values()), bad


def _look(pairs: PairList, place: int) -> bytes | BadSample:
    """A digest of a pair's image; or what of the pair cannot be read."""
    pair = pairs[place]
    try:
        with reading(pair.image, "image"), opened(pair.image) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        pair.captions()
        return digest
    except BadSample as bad:
        return bad


def divide(contents: list[bytes], classes: list[str], options: SplitOptions) -> dict[str, list[int]]:
    """Divide pairs into ``train``, ``val`` and ``test``; those whose images are the same stay together.

    Pairs are taken by a hash of the seed and their image's digest; a class that is capped keeps the first. Test and
    validation hold the wanted number or, where a group of equal images does not fit, a little less.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        groups[content].append(index)
    order = sorted(groups, key=lambda content: hashlib.sha256(b"%d:" % options.seed + content).digest())
    taken = [groups[content] for content in order]
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
