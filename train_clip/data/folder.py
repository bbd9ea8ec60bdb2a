"""A folder of images and captions → pairs, by stem.

``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder. Where a stem occurs more than once, the files
with the nearest common ancestor belong together.
"""

from __future__ import annotations

import heapq
import os
import posixpath
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train_clip.data.images import image_suffixes
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, Scan, may_read
from train_clip.errors import UserError

NAMED = 6  # files in the message on a stem


def scan_folder(folder: Path) -> Scan:
    """Pair the images and captions below a folder.

    Args:
        folder: searched with its subfolders. Names that begin with a dot and ``__MACOSX`` are passed over, and links to
            folders are not followed.

    Returns:
        What was found. Its faults are stems with two images or two captions at the same place, folders and files
        without permission, and what has the name of an image or caption but is no regular file.

    Raises:
        UserError: no such folder.
    """
    try:
        exists = folder.is_dir()
    except PermissionError:
        raise UserError(f"{folder}: no permission to look into the folder above it. Give it (chmod +x).") from None
    if not exists:
        table = " A table of pairs is given by --pairs." if folder.is_file() else ""
        raise UserError(f"{folder}: there is no such folder. Expected a folder of images and captions (.txt).{table}")
    found = _Found(folder)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in found.images_and_captions():
        by_stem[plain_name(posixpath.basename(path).rpartition(".")[0])].append(path)
    pairs: list[tuple[str, str]] = []
    lone: list[str] = []
    for stem in sorted(by_stem):
        # What is done with is let go of, or there would be two of everything for a while.
        paths = by_stem.pop(stem)
        try:
            _pair_stem(paths, pairs, lone)
        except _AmbiguousError as error:
            found.faults.append(error.message(folder))
    pairs.sort(key=lambda pair: plain_name(pair[0]))
    return Scan(
        folder,
        found.num_files,
        PairList(os.path.join(folder, ""), (image for image, _ in pairs), (caption for _, caption in pairs)),  # noqa: PTH118
        sorted(path for path in lone if not _is_caption(path)),
        sorted(path for path in lone if _is_caption(path)),
        sorted(found.faults),
        found.others,
        sorted(found.folder_links),
    )


@dataclass
class _Found:
    """What a walk through a folder meets beside images and captions."""

    folder: Path
    num_files: int = 0
    faults: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    folder_links: list[str] = field(default_factory=list)

    def images_and_captions(self) -> Iterator[str]:
        """Regular files of their suffixes below the folder, as relative POSIX paths."""
        wanted = image_suffixes() | {CAPTION_SUFFIX}
        folders = [""]
        while folders:
            parent = folders.pop()
            for entry in self._entries(parent):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                path = f"{parent}/{entry.name}" if parent else entry.name
                suffix = _suffix(entry.name)
                if suffix not in wanted and entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_symlink() and _is_folder(entry):
                    self.folder_links.append(path)
                elif suffix in wanted:
                    if fault := _fault(entry):
                        self.faults.append(f"{self.folder / path}: {fault}")
                    else:
                        self.num_files += 1
                        yield path
                elif _is_file(entry):
                    self.num_files += 1
                    self.others[suffix or "no suffix"] += 1

    def _entries(self, parent: str) -> list[os.DirEntry[str]]:
        try:
            return list(os.scandir(self.folder / parent))
        except PermissionError:
            self.faults.append(
                f"{self.folder / parent}: no permission to list this folder. Give it (chmod +rx), or move the folder "
                "away."
            )
            return []


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if stem else ""


def _is_caption(path: str) -> bool:
    return path[-len(CAPTION_SUFFIX) :].lower() == CAPTION_SUFFIX


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _fault(entry: os.DirEntry[str]) -> str | None:
    """What is wrong with an entry that has the name of an image or caption; a pipe would block its reader for ever."""
    try:
        if entry.is_file():
            if may_read(entry.path):
                return None
            return "no permission to read this file. Give it (chmod +r), or move the file away."
        kind = _kind(entry.stat().st_mode)
    except FileNotFoundError:
        kind = "a link to a file that is not there"
    except PermissionError:
        return "a link to where there is no permission to look. Give it (chmod +x), or remove the link."
    except OSError:
        kind = "a link that leads back to itself"
    return f"is {kind}; expected a regular file under this name. Rename or remove it."


def _kind(mode: int) -> str:
    for test, kind in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")):
        if test(mode):
            return kind
    return "a device"


class _AmbiguousError(Exception):
    """Two images or two captions of one stem at one place."""

    def __init__(self, place: str, images: list[str], captions: list[str]) -> None:
        super().__init__(place, images, captions)
        self.place, self.images, self.captions = place, images, captions

    def message(self, folder: Path) -> str:
        """Name the place and the files."""
        shown = sorted(self.images + self.captions)[:NAMED]
        listed = "\n".join(f"  {path}" for path in shown)
        more = len(self.images) + len(self.captions) - len(shown)
        return (
            f"{folder / self.place}: one stem has {_number(len(self.images), 'image')} and "
            f"{_number(len(self.captions), 'caption')}, so it is not clear which belong together:\n{listed}\n"
            f"{f'  and {more} more.' + chr(10) if more else ''}  Expected one of each. Rename or remove the others."
        )


def _pair_stem(files: list[str], pairs: list[tuple[str, str]], lone: list[str]) -> None:
    """Pair the files of one stem, deepest folder first; what finds no partner moves up."""
    if len(files) == 2 and _is_caption(files[0]) != _is_caption(files[1]):
        # Nearly every stem of nearly every folder: wherever the two lie, there is a folder above both.
        image, caption = sorted(files, key=_is_caption)
        pairs.append((image, caption))
        return
    waiting: dict[str, list[str]] = defaultdict(list)
    for path in files:
        waiting[posixpath.dirname(path)].append(path)
    deepest_first = [(-_depth(place), place) for place in waiting]
    heapq.heapify(deepest_first)
    while deepest_first:
        _, place = heapq.heappop(deepest_first)
        here = waiting.pop(place)
        images, captions = [p for p in here if not _is_caption(p)], [p for p in here if _is_caption(p)]
        if images and captions:
            if len(here) > 2:
                raise _AmbiguousError(place, images, captions)
            pairs.append((images[0], captions[0]))
        elif not place:
            lone += here
        else:
            above = posixpath.dirname(place)
            if above not in waiting:
                heapq.heappush(deepest_first, (-_depth(above), above))
            waiting[above] += here


def _depth(place: str) -> int:
    return place.count("/") + 1 if place else 0


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
