"""The pairs to train on, found by names only: nothing is decoded here."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

from train_clip.data.pairs import PairList
from train_clip.errors import UsageError, UserError
from train_clip.files import inside
from train_clip.options import SourceOptions
from train_clip.printing import printable

# A source is given by a path: the folder, or the option of its name. A new one is a line here, a file and an option.
SOURCES = {
    "folder": "train_clip.data.folder:scan_folder",
    "pairs": "train_clip.data.table:scan_table",
    "shards": "train_clip.shards.find:scan_shards",
    "dataset": "train_clip.shards.dataset:scan_dataset",
}
DEFAULTS = SourceOptions()

CAPTION_SUFFIX = ".txt"
NAMED = 5  # faults in a message
GONE = "does not exist, or is a link to a missing file"
EXPECTED = {
    "stem": "  The files of a pair share a stem: cat.jpg and cat.txt, one caption per line. Rename the files, or list "
    "them in a table (--pairs). If they share a number (image1.jpg, text1.txt), pass --pair_by number.",
    "number": "  The files of a pair share a number: image1.jpg and text1.txt, one caption per line. Rename the files.",
    "shards": "  The files of a pair share what stands before the first dot: cat.jpg and cat.txt, in one shard.",
    "dataset": "  Expected rows with an image and a caption that is not empty.",
    "table": "  Expected rows with an image and a caption that is not empty; image paths are relative to the table's "
    "folder.",
}
# Suffixes of files that may lie in place of pairs, and what to do with them.
ADVICE = {
    ".tar": "Shards (tars of images and captions) are read by --shards.",
    ".tgz .gz .bz2 .xz .zst .zip .7z": "Archives are not read: unpack them (tar -xf FILE.tgz, unzip FILE.zip).",
    ".parquet": "Parquet files that hold images are read by --dataset.",
    ".arrow .feather .tfrecord .h5 .hdf5 .mdb": "Such files are not read: write their images and captions as "
    "files (cat.jpg, cat.txt), or paths and captions as a table (.csv).",
    ".csv .tsv .jsonl": "A table of image paths and captions is read by --pairs TABLE.",
    ".json .xlsx .xls .ods": "Save image paths and captions as a table (.csv, .tsv, .jsonl), which --pairs reads.",
}
# How a path may begin that means nothing here.
PATH_ADVICE = {
    r"[~$]": "Neither ~ nor variables are expanded: write the whole path.",
    r"file:/": "Write the path without file://.",
    r"[a-z][a-z0-9+.-]+:/": "Nothing is downloaded: download the files first, and give their paths.",
    r"[^/]*\\": "Separate folders by / instead of a backslash.",
}
READABLE = "expected a readable regular file (chmod +r; chmod +x a folder)"


def scan_source(folder: Path | None, options: SourceOptions) -> "Scan":
    """Find the pairs of a folder, or of whichever other source the options give."""
    name, path = given_source(folder, options)
    scan: Scan = resolve_name(SOURCES[name])(path, options)
    return scan


def given_source(folder: Path | None, options: SourceOptions) -> tuple[str, Path]:
    """The key in ``SOURCES`` and the path of the one source that is given, or a ``UserError``."""
    paths = vars(options) | {"folder": folder}
    given = [(name, paths[name]) for name in SOURCES if paths[name] is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name} {path}" for name, path in given) or "nowhere"
        raise UsageError(f"Data from: {found}. Expected one of {', '.join(f'--{name}' for name in SOURCES)}.")
    name, path = given[0]
    if name != "folder" and options.pair_by != "stem":
        raise UsageError(f"--pair_by {options.pair_by}: is only for a folder; {path} lists the pairs itself.")
    return name, Path(path)


@dataclass
class Scan:
    """The contents of a source."""

    source: Path
    num_entries: int  # regular files of any kind, or rows
    pairs: PairList  # in the order of the image's name, the same on every machine
    lone_images: list[str]  # without a caption, by name
    lone_captions: list[str]  # without an image, by name
    faults: list[str] = field(default_factory=list)  # what no run can begin with, a message each
    others: Counter[str] = field(default_factory=Counter)  # files that are neither image nor caption, by suffix
    folder_links: list[str] = field(default_factory=list)  # links to folders, which are not followed
    pair_by: str = "stem"

    def require_pairs(self) -> "Scan":
        """Itself, or a ``UserError`` of what is at fault, or of what was found in place of pairs."""
        if self.faults:
            more = len(self.faults) - NAMED
            named = "\n".join(self.faults[:NAMED])
            raise UserError(named + (f"\nand {more:,} more: `train-clip data check` lists all." if more > 0 else ""))
        if self.pairs:
            return self
        kind = "table" if self.source.is_file() and self.pair_by == "stem" else self.pair_by
        what = "rows" if kind in ("table", "dataset") else "files"
        lines = [f"{self.source}: 0 pairs among {self.num_entries:,} {what}."]
        for what, names in (
            ("Images without a caption", self.lone_images),
            ("Captions without an image", self.lone_captions),
            ("Links to folders, which are not followed: give their targets instead", self.folder_links),
        ):
            if names:
                lines.append(f"  {what}: {len(names):,}, for instance {printable(names[0])}.")
        if self.others:
            others = (f"{count:,} × {printable(suffix)}" for suffix, count in self.others.most_common(NAMED))
            lines.append(f"  Neither images nor captions: {', '.join(others)}.{advice_on(self.others)}")
        if kind == "table":
            lines += dict.fromkeys(f" {advice}" for advice in map(path_advice, self.lone_captions) if advice)
        raise UserError("\n".join([*lines, EXPECTED[kind]]))


def advice_on(suffixes: Iterable[str]) -> str:
    """What to do with files that are not read, by their suffixes, as sentences to append."""
    return "".join(f" {advice}" for known, advice in ADVICE.items() if not set(known.split()).isdisjoint(suffixes))


def path_advice(path: str) -> str:
    """What to do with a path that is not found, by how it begins, as a sentence to append."""
    return next((f" {advice}" for start, advice in PATH_ADVICE.items() if re.match(start, path, re.I)), "")


def fault_of(path: str, is_regular: bool = False) -> str:
    """What keeps this process's user from reading a file, ``GONE`` or another; empty where nothing does."""
    if inside(path):  # what ails a shard is no bad sample, and said where it is read
        return ""
    try:
        if not (is_regular or stat.S_ISREG(os.stat(path).st_mode)):  # noqa: PTH116, a quarter of the time
            return "is not a regular file"
        return "" if os.access(path, os.R_OK) else "no permission to read this file"
    except (FileNotFoundError, NotADirectoryError):
        return GONE
    except PermissionError:
        return "no permission to open its folder"
    except (OSError, ValueError) as error:
        return f"cannot be looked up ({error})"
