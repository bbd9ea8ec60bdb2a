"""What there is to train on, as found by names alone: nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from train_clip.data.pairs import PairList
from train_clip.errors import UserError

CAPTION_SUFFIX = ".txt"
NAMED = 5  # faults in a message
KNOWN_FOLDERS = (
    "img",
    "text",
    "npz",
)  # of the fork of train-CLIP, whose pictures show image1.jpg, text1.txt, data1.npz
SHOWN = 3  # names of each of them

PairBy = Literal["stem", "number"]  # what of their names a pair's files share
EFFECTIVE = os.access in os.supports_effective_ids


@dataclass(frozen=True)
class Scan:
    """What a folder or a table holds.

    Args:
        source: the folder or the table.
        num_entries: regular files of any kind; or rows.
        pairs: in the order of the image's name, the same on every machine.
        lone_images: images without a caption, by name.
        lone_captions: captions without an image, by name.
        faults: what no run can begin with, a message each.
        others: how many of the files are neither image nor caption, by suffix.
        folder_links: links to folders, which are not followed.
        pair_by: what made them pairs.
    """

    source: Path
    num_entries: int
    pairs: PairList
    lone_images: list[str]
    lone_captions: list[str]
    faults: list[str] = field(default_factory=list)
    others: Mapping[str, int] = field(default_factory=dict)
    folder_links: list[str] = field(default_factory=list)
    pair_by: PairBy = "stem"

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
            raise UserError(self._no_pairs())
        return self

    def followed_by(self, other: Scan) -> Scan:
        """This scan's pairs and then the other's, with what both found."""
        return Scan(
            self.source,
            self.num_entries + other.num_entries,
            self.pairs.followed_by(other.pairs),
            self.lone_images + other.lone_images,
            self.lone_captions + other.lone_captions,
            self.faults + other.faults,
            self.others,
            self.folder_links,
            self.pair_by,
        )

    def _no_pairs(self) -> str:
        table = self.source.is_file()
        lines = [f"{self.source}: 0 pairs among {self.num_entries:,} {'rows' if table else 'files'}."]
        if self.lone_images:
            example = self.lone_images[0]
            wanted = "its caption is empty" if table else self._wanted(example)
            lines.append(f"  Images without a caption: {len(self.lone_images):,}, for instance {example} ({wanted}).")
        if self.lone_captions:
            example = self.lone_captions[0]
            wanted = f" (no {self.source.parent / example})" if table else ""
            lines.append(f"  Captions without an image: {len(self.lone_captions):,}, for instance {example}{wanted}.")
        if self.folder_links:
            lines.append(
                f"  Links to folders, which are not followed: {len(self.folder_links):,}, for instance "
                f"{self.folder_links[0]}. Give the folder that it leads to."
            )
        if table:
            lines.append("  Expected rows of an image and a caption, the image's path relative to the table's folder.")
        elif self.pair_by == "number":
            lines.append("  A pair shares its number: image1.jpg and text1.txt, one caption a line. Rename the files.")
        else:
            lines += self._by_number()
            lines.append(
                "  A pair shares its stem: cat.jpg and cat.txt, one caption a line. Rename the files so that they do, "
                "or list them in a table (--pairs)."
            )
        return "\n".join(lines)

    def _wanted(self, image: str) -> str:
        """What an image lacks."""
        return (
            f"no {PurePosixPath(image).stem}{CAPTION_SUFFIX}" if self.pair_by == "stem" else "no caption of its number"
        )

    def _by_number(self) -> list[str]:
        """What lies in folders that are known, and the offer to pair it by number; nothing where it is not so."""
        names = {
            known: [
                name.partition("/")[2] for name in self.lone_images + self.lone_captions if name.startswith(f"{known}/")
            ]
            for known in KNOWN_FOLDERS
        }
        lines = [f"  {known}/ holds {', '.join(some[:SHOWN])}" for known, some in names.items() if some]
        if len(lines) < 2:
            return []
        return [*lines, "  If the number in its name says which belong together, pass --pair_by number."]


def may_read(path: str) -> bool:
    """Whether this process's user may read a file."""
    return os.access(path, os.R_OK, effective_ids=EFFECTIVE)
