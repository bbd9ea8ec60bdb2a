"""The files of a folder → pairs, by what their names share.

By stem: ``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder. Where a stem occurs more than once,
the files with the nearest common ancestor belong together. By number: ``image1.jpg`` and ``text1.txt`` are one.

``npz/cat.npz`` is the cache of ``cat.jpg`` or ``img/cat.jpg``, and ``npz/u/cat.npz`` that of ``u/cat.jpg``: it is read
in its image's place, and the pair is still known by its image. Any other array is an image like others.
"""

from __future__ import annotations

import heapq
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train_clip.data import npz
from train_clip.data.pairs import plain_name
from train_clip.data.scan import CAPTION_SUFFIX, PairBy

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
