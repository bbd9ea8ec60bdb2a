"""What there is to train on, as found by names alone: nothing is decoded here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
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
KNOWN_FOLDERS = ("img", "text", "npz")  # of the fork of train-CLIP: image1.jpg, text1.txt, data1.npz
SHOWN = 3  # names of each of them
EFFECTIVE = os.access in os.supports_effective_ids


def scan_source(folder: Path | None, options: SourceOptions) -> Scan:
    """Find the pairs of a folder, or of whichever other source the options give.

    Raises:
        UserError: several are given or none, there is nothing of the kind, or another one is to be paired by number.
    """
    paths = {name: folder if name == "folder" else getattr(options, name) for name in SOURCES}
    given = [(name, path) for name, path in paths.items() if path is not None]
    if not given:
        raise UserError("No data was given. Expected a folder of images and captions, or a table of pairs (--pairs).")
    if len(given) > 1:
        raise UserError(f"Both {' and '.join(f'--{name} {path}' for name, path in given)} were given; expected one.")
    ((name, path),) = given
    if name != "folder" and options.pair_by != "stem":
        raise UserError(f"--pair_by {options.pair_by}: is for a folder; {path} says itself what belongs together.")
    scan: Callable[[Path, SourceOptions], Scan] = resolve_name(SOURCES[name])
    return scan(path, options)


@dataclass(frozen=True)
class Scan:
    """What a source holds."""

    source: Path
    num_entries: int  # regular files of any kind, or rows
    pairs: PairList  # in the order of the image's name, the same on every machine
    lone_images: list[str]  # without a caption, by name
    lone_captions: list[str]  # without an image, by name
    faults: list[str] = field(default_factory=list)  # what no run can begin with, a message each
    others: Mapping[str, int] = field(default_factory=dict)  # files that are neither image nor caption, by suffix
    folder_links: list[str] = field(default_factory=list)  # links to folders, which are not followed
    pair_by: str = "stem"

    def require_pairs(self) -> Scan:
        """Return itself.

        Raises:
            UserError: something is at fault, or there is no pair. The message says what was found instead.
        """
        if self.faults:
            more = len(self.faults) - NAMED
            named = "\n".join(self.faults[:NAMED])
            raise UserError(named + (f"\nand {more:,} more: `train-clip data check` lists all." if more > 0 else ""))
        if not self.pairs:
            raise UserError("\n".join(self._no_pairs()))
        return self

    def followed_by(self, other: Scan) -> Scan:
        """This scan's pairs and then the other's, with what both found."""
        return dataclasses.replace(
            self,
            num_entries=self.num_entries + other.num_entries,
            pairs=self.pairs.followed_by(other.pairs),
            lone_images=self.lone_images + other.lone_images,
            lone_captions=self.lone_captions + other.lone_captions,
            faults=self.faults + other.faults,
        )

    def _no_pairs(self) -> list[str]:
        table, by_number = self.source.is_file(), self.pair_by == "number"
        lines = [f"{self.source}: 0 pairs among {self.num_entries:,} {'rows' if table else 'files'}."]
        for image in self.lone_images[:1]:
            of_its_name = "no caption of its number" if by_number else f"no {PurePosixPath(image).stem}{CAPTION_SUFFIX}"
            wanted = "its caption is empty" if table else of_its_name
            lines.append(f"  Images without a caption: {len(self.lone_images):,}, for instance {image} ({wanted}).")
        for image in self.lone_captions[:1]:
            wanted = f" (no {self.source.parent / image})" if table else ""
            lines.append(f"  Captions without an image: {len(self.lone_captions):,}, for instance {image}{wanted}.")
        for link in self.folder_links[:1]:
            lines.append(
                f"  Links to folders, which are not followed: {len(self.folder_links):,}, for instance {link}. Give "
                "the folder that it leads to."
            )
        if table:
            return [
                *lines,
                "  Expected rows of an image and a caption, the image's path relative to the table's folder.",
            ]
        if by_number:
            return [
                *lines,
                "  A pair shares its number: image1.jpg and text1.txt, one caption a line. Rename the files.",
            ]
        return [
            *lines,
            *self._by_number(),
            "  A pair shares its stem: cat.jpg and cat.txt, one caption a line. Rename the files so that they do, or "
            "list them in a table (--pairs).",
        ]

    def _by_number(self) -> list[str]:
        """What lies in folders that are known, and the offer to pair it by number; nothing where it is not so."""
        lines = []
        for known in KNOWN_FOLDERS:
            start = f"{known}/"
            names = [name for name in self.lone_images + self.lone_captions if name.startswith(start)]
            if names:
                lines.append(f"  {start} holds {', '.join(name.removeprefix(start) for name in names[:SHOWN])}")
        offer = "  If the number in its name says which belong together, pass --pair_by number."
        return [*lines, offer] if len(lines) > 1 else []


def may_read(path: str) -> bool:
    """Whether this process's user may read a file."""
    return os.access(path, os.R_OK, effective_ids=EFFECTIVE)
