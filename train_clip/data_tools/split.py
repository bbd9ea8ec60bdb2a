"""Divide pairs into tables for training, validation and test."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from train_clip.commands.progress import with_progress
from train_clip.data.pairs import PairList, shown
from train_clip.data.samples import available_cores
from train_clip.data.scan import scan_source
from train_clip.data.split import Shares, divide
from train_clip.data.table import write_table
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.zero_shot import class_name
from train_clip.options import BELOW_ONE, SourceOptions, at_least, option

NAMED = 5  # files on the screen
AT_ONCE = 1024  # images


@dataclass(frozen=True)
class SplitOptions(SourceOptions):
    """How the pairs are divided."""

    output: Path = option(Path("split"), "a folder for train.csv, val.csv and test.csv")
    val_share: float = option(0.05, "share of the pairs to validate on", BELOW_ONE)
    test_share: float = option(0.05, "share of the pairs to test on", BELOW_ONE)
    seed: int = option(0, "decides which")
    max_per_class: int | None = option(
        None,
        "keep at most so many pairs of a class, which STEM.cls beside the image names, or its folder",
        at_least(1),
    )


def data_split(folder: Path | None = None, /, *, options: SplitOptions) -> dict[str, int]:
    """Divide pairs into tables for training, validation and test; equal images stay on one side.

    Which pairs go where depends on the seed and the images' content alone: not on names, nor on the machine.

    Args:
        folder: images and captions that share a stem; --pairs gives a table in its place
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
    if there := [str(table) for table in tables.values() if table.exists()]:
        raise UserError(f"{', '.join(there)}: there already, and left as it is. Give another --output, or remove it.")
    pairs, digests = _readable(scan_source(folder, options).require_pairs().pairs)
    classes = [class_name(Path(pair.image)) for pair in pairs] if options.max_per_class else []
    shares = Shares(options.val_share, options.test_share, options.seed, options.max_per_class)
    parts = divide(digests, classes, shares)
    for part, table in tables.items():
        write_table(table, ((pairs[place].image, pairs[place].captions()) for place in parts[part]))
        print(f"{table}: {len(parts[part]):,} pairs")
    sizes = {part: len(places) for part, places in parts.items()}
    if left_out := len(pairs) - sum(sizes.values()):
        print(f"{left_out:,} pairs left out by --max_per_class {options.max_per_class}.")
    if sizes["val"] < 2:
        print(f"Too few pairs for {tables['val']} to be validated on: it takes 2 to tell one from another.")
    validated = f" --val_pairs {tables['val']}" if sizes["val"] > 1 else ""
    print(f"Next: train-clip train --pairs {tables['train']}{validated}")
    return sizes


def _readable(pairs: PairList) -> tuple[PairList, list[bytes]]:
    """The pairs whose image file and captions can be read, and a digest of each image; the others are named."""
    digests: list[bytes] = []
    with ThreadPoolExecutor(available_cores()) as pool:
        # Reading and hashing let other threads run.
        for start in with_progress(range(0, len(pairs), AT_ONCE), f"times {AT_ONCE:,} images"):
            images = (pairs[place].image for place in range(start, min(start + AT_ONCE, len(pairs))))
            digests += pool.map(_digest, images)
    kept, bad = [], []
    for place, pair in enumerate(pairs):
        try:
            pair.image.encode()
            if not digests[place]:
                raise BadSample(pair.image, "cannot be read")
            pair.captions()
            kept.append(place)
        except UnicodeEncodeError:
            raise UserError(
                f"{shown(pair.image)}: its name is not UTF-8, so no table can hold it. Rename it."
            ) from None
        except BadSample as error:
            bad.append(f"Left out: {error}")
    for line in bad[:NAMED]:
        print(line)
    if len(bad) > NAMED:
        print(f"… and {len(bad) - NAMED:,} more.")
    return pairs.take(kept), [digests[place] for place in kept]


def _digest(path: str) -> bytes:
    """Of the file's content; empty where it cannot be read."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123, a third of the time
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""
