"""A folder of images and captions → pairs: a walk through it that meets whatever lies in folders.

The files of a folder → pairs, by what their names share.

By stem: ``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder. Where a stem occurs more than once,
the files with the nearest common ancestor belong together. By number: ``image1.jpg`` and ``text1.txt`` are one.

``npz/cat.npz`` is the cache of ``cat.jpg`` or ``img/cat.jpg``, and ``npz/u/cat.npz`` that of ``u/cat.jpg``: it is read
in its image's place, and the pair is still known by its image. Any other array is an image like others.
"""

from __future__ import annotations

import heapq
import os
import posixpath
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train_clip.data import arrays as npz
from train_clip.data.images import image_suffixes
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, PairBy, Scan, may_read
from train_clip.errors import UserError

NAMED = 6  # files in the message on a stem
CACHE, IMAGES = "npz/", "img/"  # folders that have a meaning, where they lie at the top


@dataclass
class Pairing:
    """What belongs together, all as relative POSIX paths.

    Args:
        pairs: an image and a caption file each.
        lone: files that belong to none.
        caches: the array of each image that has one.
        faults: names that leave it unclear, a message each.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    lone: list[str] = field(default_factory=list)
    caches: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def pair_by_stem(folder: Path, paths: Iterable[str]) -> Pairing:
    """Pair images and captions of one stem.

    Args:
        folder: for messages.
        paths: images and captions below it.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_stem[plain_name(_stem(path))].append(path)
    found = Pairing()
    for stem in sorted(by_stem):
        # What is done with is let go of, or there would be two of everything for a while.
        files = _without_caches(by_stem.pop(stem), found.caches)
        try:
            _pair_stem(files, found.pairs, found.lone)
        except _AmbiguousError as error:
            found.faults.append(error.message(folder))
    return found


def pair_by_number(folder: Path, paths: Iterable[str]) -> Pairing:
    """Pair the image, the caption and the array whose names hold one number; names without a number stand alone.

    Args:
        folder: for messages.
        paths: images and captions below it.
    """
    by_number: dict[int, list[str]] = defaultdict(list)
    found = Pairing()
    for path in paths:
        numbers = re.findall("[0-9]+", _stem(path))
        if len(numbers) == 1:
            by_number[int(numbers[0])].append(path)
        elif numbers:
            found.faults.append(
                f"{folder / path}: holds {len(numbers)} numbers ({', '.join(numbers)}), so it is not clear by which it "
                "pairs. Expected one (--pair_by number). Rename it, or list the pairs in a table (--pairs)."
            )
        else:
            found.lone.append(path)
    for number in sorted(by_number):
        files = sorted(by_number.pop(number))
        captions = [path for path in files if is_caption(path)]
        arrays = [path for path in files if _in_cache(path)]
        images = [path for path in files if path not in captions + arrays]
        if max(map(len, (images, captions, arrays))) > 1:
            listed = "\n".join(f"  {path}" for path in files[:NAMED])
            found.faults.append(
                f"{folder}: the number {number} is in {len(files)} names, so it is not clear which belong together:\n"
                f"{listed}\n  Expected one image, one caption and one array in npz/ at most. Rename the others."
            )
            continue
        if images and arrays:
            found.caches[images[0]] = arrays.pop()
        if captions and (images or arrays):
            found.pairs.append(((images or arrays)[0], captions[0]))
        else:
            found.lone += captions or images or arrays
    return found


PAIRINGS: Mapping[PairBy, Callable[[Path, Iterable[str]], Pairing]] = {"stem": pair_by_stem, "number": pair_by_number}


def cache_name(image: str) -> str:
    """Where the cache of an image lies, both as POSIX paths below one folder."""
    return f"{CACHE}{image.removeprefix(IMAGES).rpartition('.')[0]}{npz.SUFFIX}"


def is_caption(path: str) -> bool:
    """Whether a file holds captions, by its name."""
    return path[-len(CAPTION_SUFFIX) :].lower() == CAPTION_SUFFIX


def _stem(path: str) -> str:
    return posixpath.basename(path).rpartition(".")[0]


def _in_cache(path: str) -> bool:
    return path.startswith(CACHE) and npz.is_npz(path)


def _without_caches(files: list[str], caches: dict[str, str]) -> list[str]:
    """The files of a stem but for the caches of its images, which are noted."""
    arrays = [path for path in files if _in_cache(path)]
    if not arrays:
        return files
    owners: dict[str, list[str]] = defaultdict(list)
    for path in files:
        if not is_caption(path) and not npz.is_npz(path):
            owners[plain_name(cache_name(path))].append(path)
    for array in arrays:
        if len(images := owners[plain_name(array)]) == 1:
            caches[images[0]] = array
            files = [path for path in files if path != array]
    return files


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
    if len(files) == 2 and is_caption(files[0]) != is_caption(files[1]):
        # Nearly every stem of nearly every folder: wherever the two lie, there is a folder above both.
        image, caption = sorted(files, key=is_caption)
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
        images, captions = [p for p in here if not is_caption(p)], [p for p in here if is_caption(p)]
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


def scan_folder(folder: Path, pair_by: PairBy = "stem") -> Scan:
    """Pair the images and captions below a folder.

    Args:
        folder: searched with its subfolders. Names that begin with a dot and ``__MACOSX`` are passed over, and links to
            folders are not followed.
        pair_by: what of their names a pair's files share: the stem, or the number.

    Returns:
        What was found. Its faults are names of which it is not clear which belong together, folders and files without
        permission, and what has the name of an image or caption but is no regular file.

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
    paired = PAIRINGS[pair_by](folder, found.images_and_captions())
    pairs = sorted(paired.pairs, key=lambda pair: plain_name(pair[0]))
    caches = (paired.caches.get(image, "") for image, _ in pairs) if paired.caches else ()
    return Scan(
        folder,
        found.num_files,
        PairList(
            os.path.join(folder, ""),  # noqa: PTH118, with its separator at the end
            (image for image, _ in pairs),
            (caption for _, caption in pairs),
            caches=caches,
        ),
        sorted(path for path in paired.lone if not is_caption(path)),
        sorted(path for path in paired.lone if is_caption(path)),
        sorted(found.faults + paired.faults),
        found.others,
        sorted(found.folder_links),
        pair_by,
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
        wanted = image_suffixes() | {npz.SUFFIX, CAPTION_SUFFIX}
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
