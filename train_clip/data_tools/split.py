"""Divide pairs into tables for training, validation and test."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from train_clip.commands.options import TableOptions, require_least
from train_clip.commands.progress import with_progress
from train_clip.data.pairs import PairList, shown
from train_clip.data.samples import available_cores
from train_clip.data.scan import scan_source
from train_clip.data.split import Shares, divide, require_share
from train_clip.data.table import write_table
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.zero_shot import class_name

NAMED = 5  # files on the screen
AT_ONCE = 1024  # images


@dataclass(frozen=True)
class SplitOptions(TableOptions):
    """How the pairs are divided.

    Args:
        output: a folder for train.csv, val.csv and test.csv
        val_share: share of the pairs to validate on
        test_share: share of the pairs to test on
        seed: decides which
        max_per_class: keep at most so many pairs of a class, which STEM.cls beside the image names, or its folder
    """

    output: Path = Path("split")
    val_share: float = 0.05
    test_share: float = 0.05
    seed: int = 0
    max_per_class: int | None = None


def data_split(folder: Path | None = None, /, *, options: SplitOptions) -> dict[str, int]:
    """Divide pairs into tables for training, validation and test; equal images stay on one side.

    Which pairs go where depends on the seed and the images' content alone: not on names, nor on the machine.

    Args:
        folder: images and captions that share a stem; --pairs gives a table in its place
        options: how.

    Returns:
        How many pairs each table holds.

    Raises:
        UserError: shares that cannot be, nothing to divide, or tables that are there already.
    """
    require_share("val_share", options.val_share)
    require_share("test_share", options.test_share)
    if options.val_share + options.test_share >= 1:
        raise UserError(
            f"--val_share {options.val_share} and --test_share {options.test_share} leave nothing; expected their sum "
            "below 1."
        )
    require_least(max_per_class=(1 if options.max_per_class is None else options.max_per_class, 1))
    tables = {part: options.output / f"{part}.csv" for part in ("train", "val", "test")}
    if there := [str(table) for table in tables.values() if table.exists()]:
        raise UserError(f"{', '.join(there)}: there already, and left as it is. Give another --output, or remove it.")
    pairs = scan_source(folder, options.source).require_pairs().pairs
    pairs, digests = readable(pairs)
    classes = [class_name(Path(pair.image)) for pair in pairs] if options.max_per_class else []
    shares = Shares(options.val_share, options.test_share, options.seed, options.max_per_class)
    parts = divide(digests, classes, shares)
    for part, table in tables.items():
        write_table(table, ((pairs[place].image, pairs[place].captions()) for place in parts[part]))
        print(f"{table}: {len(parts[part]):,} pairs")
    left_out = len(pairs) - sum(map(len, parts.values()))
    if left_out:
        print(f"{left_out:,} pairs left out by --max_per_class {options.max_per_class}.")
    if len(parts["val"]) < 2:
        print(f"Too few pairs for {tables['val']} to be validated on: it takes 2 to tell one from another.")
    validated = f" --val_pairs {tables['val']}" if len(parts["val"]) > 1 else ""
    print(f"Next: train-clip train --pairs {tables['train']}{validated}")
    return {part: len(places) for part, places in parts.items()}


def readable(pairs: PairList) -> tuple[PairList, list[bytes]]:
    """The pairs whose image file and captions can be read, and a digest of each image; the others are named."""
    digests: list[bytes | None] = []
    with ThreadPoolExecutor(available_cores()) as pool:
        # Reading and hashing let other threads run.
        for start in with_progress(range(0, len(pairs), AT_ONCE), f"times {AT_ONCE:,} images"):
            images = [pairs[place].image for place in range(start, min(start + AT_ONCE, len(pairs)))]
            digests += pool.map(_digest, images)
    kept, bad = [], []
    for place, pair in enumerate(pairs):
        if not _is_utf8(pair.image):
            raise UserError(f"{shown(pair.image)}: its name is not UTF-8, so no table can hold it. Rename it.")
        try:
            if digests[place] is None:
                raise BadSample(pair.image, "cannot be read")
            pair.captions()
            kept.append(place)
        except BadSample as error:
            bad.append(f"Left out: {error.path}: {error.reason}")
    for line in bad[:NAMED]:
        print(line)
    if len(bad) > NAMED:
        print(f"… and {len(bad) - NAMED:,} more.")
    return pairs.take(kept), [digests[place] or b"" for place in kept]


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _digest(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123, a third of the time
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
