"""What there is to train on, as found by names alone: nothing is decoded here."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from pkgutil import resolve_name

from train_clip.data.pairs import PairList
from train_clip.errors import UserError
from train_clip.options import SourceOptions

# A source is given by a path: the folder, or the option of its name. A new one is a line here, a file and an option.
SOURCES = {"folder": "train_clip.data.folder:scan_folder", "pairs": "train_clip.data.table:scan_table"}
DEFAULTS = SourceOptions()

CAPTION_SUFFIX = ".txt"
NAMED = 5  # faults in a message
KNOWN_FOLDERS = ("img/", "text/", "npz/")  # of the fork of train-CLIP: image1.jpg, text1.txt, data1.npz
SHOWN = 3  # names of each of them
EFFECTIVE = os.access in os.supports_effective_ids


def scan_source(folder: Path | None, options: SourceOptions) -> "Scan":
    """Find the pairs of a folder, or of whichever other source the options give."""
    name, path = given_source(folder, options)
    scan: Scan = resolve_name(SOURCES[name])(path, options)
    return scan


def given_source(folder: Path | None, options: SourceOptions) -> tuple[str, Path]:
    """The key in ``SOURCES`` and the path of the one source that is given, or a ``UserError``."""
    paths = vars(options) | {"folder": folder}
    given = [(name, paths[name]) for name in SOURCES if paths[name] is not None]
    if not given:
        raise UserError("No data was given. Expected --folder FOLDER, or a table of pairs (--pairs).")
    if len(given) > 1:
        raise UserError(
            f"Both {' and '.join(f'--{name} {path}' for name, path in given)} were given; expected one of them."
        )
    name, path = given[0]
    if name != "folder" and options.pair_by != "stem":
        raise UserError(f"--pair_by {options.pair_by}: is for a folder; {path} says itself what belongs together.")
    return name, path


@dataclass
class Scan:
    """What a source holds."""

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
        if not self.pairs:
            raise UserError("\n".join(self._no_pairs()))
        return self

    def _no_pairs(self) -> list[str]:
        table, by_number = self.source.is_file(), self.pair_by == "number"
        images, captions, links = self.lone_images, self.lone_captions, self.folder_links
        lines = [f"{self.source}: 0 pairs among {self.num_entries:,} {'rows' if table else 'files'}."]
        if images:
            of_its_stem = f"no {PurePosixPath(images[0]).stem}{CAPTION_SUFFIX}"
            wanted = "its caption is empty" if table else "no caption of its number" if by_number else of_its_stem
            lines.append(f"  Images without a caption: {len(images):,}, for instance {images[0]} ({wanted}).")
        if captions:
            wanted = f" (no {self.source.parent / captions[0]})" if table else ""
            lines.append(f"  Captions without an image: {len(captions):,}, for instance {captions[0]}{wanted}.")
        if links:
            lines.append(
                f"  Links to folders, which are not followed: {len(links):,}, for instance {links[0]}. Give the folder "
                "that it leads to."
            )
        if table:
            lines.append("  Expected rows of an image and a caption, the image's path relative to the table's folder.")
        elif by_number:
            lines.append("  A pair shares its number: image1.jpg and text1.txt, one caption a line. Rename the files.")
        else:
            holding = []
            for name in KNOWN_FOLDERS:
                if some := [path.removeprefix(name) for path in images + captions if path.startswith(name)]:
                    holding.append(f"  {name} holds {', '.join(some[:SHOWN])}")
            if len(holding) > 1:
                offer = "  If the number in its name says which belong together, pass --pair_by number."
                lines += [*holding, offer]
            lines.append(
                "  A pair shares its stem: cat.jpg and cat.txt, one caption a line. Rename the files so that they do, "
                "or list them in a table (--pairs)."
            )
        return lines


def may_read(path: str) -> bool:
    """Whether this process's user may read a file."""
    return os.access(path, os.R_OK, effective_ids=EFFECTIVE)
