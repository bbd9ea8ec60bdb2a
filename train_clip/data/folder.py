"""A folder of images and captions → pairs: a walk through whatever lies there, and pairing by what names share.

By stem: ``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder. Where a stem occurs more than once,
the files with the nearest common ancestor belong together. By number: ``image1.jpg`` and ``text1.txt`` are one.

``npz/cat.npz`` is the cache of ``cat.jpg`` or ``img/cat.jpg``, and ``npz/u/cat.npz`` that of ``u/cat.jpg``: it is read
in its image's place, and the pair is still known by its image. Any other array is an image like others.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train_clip.data.images import ARRAY_SUFFIX, image_suffixes, is_npz
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, DEFAULTS, Scan, may_read
from train_clip.errors import UserError
from train_clip.options import PairBy, SourceOptions

NAMED = 6  # files in the message on a stem
CACHE, IMAGES = "npz/", "img/"  # folders that have a meaning, where they lie at the top


def scan_folder(folder: Path, options: SourceOptions = DEFAULTS) -> Scan:
    """Pair the images and captions below a folder.

    Args:
        folder: searched with its subfolders. Names that begin with a dot and ``__MACOSX`` are passed over, and links to
            folders are not followed.
        options: what of their names a pair's files share: the stem, or the number.

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
    PAIRINGS[options.pair_by](found, _images_and_captions(found))
    found.pairs.sort(key=lambda pair: plain_name(pair[0]))
    images = [image for image, _ in found.pairs]
    return Scan(
        folder,
        found.num_files,
        PairList(
            os.path.join(folder, ""),  # noqa: PTH118, with its separator at the end
            images,
            (caption for _, caption in found.pairs),
            caches=(found.caches.get(image, "") for image in images) if found.caches else (),
        ),
        sorted(path for path in found.lone if not is_caption(path)),
        sorted(path for path in found.lone if is_caption(path)),
        sorted(found.faults),
        found.others,
        sorted(found.folder_links),
        options.pair_by,
    )


def cache_name(image: str) -> str:
    """Where the cache of an image lies, both as POSIX paths below one folder."""
    return f"{CACHE}{image.removeprefix(IMAGES).rpartition('.')[0]}{ARRAY_SUFFIX}"


def is_caption(path: str) -> bool:
    """Whether a file holds captions, by its name."""
    return path[-len(CAPTION_SUFFIX) :].lower() == CAPTION_SUFFIX


@dataclass
class _Found:
    """What lies below a folder, as relative POSIX paths."""

    folder: Path
    num_files: int = 0
    pairs: list[tuple[str, str]] = field(default_factory=list)  # an image and a caption file each
    lone: list[str] = field(default_factory=list)  # that belong to none
    caches: dict[str, str] = field(default_factory=dict)  # the array of each image that has one
    faults: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    folder_links: list[str] = field(default_factory=list)


def _images_and_captions(found: _Found) -> Iterator[str]:
    """Regular files of their suffixes; what else there is, is noted."""
    wanted = image_suffixes() | {ARRAY_SUFFIX, CAPTION_SUFFIX}
    folders = [""]
    while folders:
        parent = folders.pop()
        try:
            entries = list(os.scandir(found.folder / parent))
        except PermissionError:
            found.faults.append(
                f"{found.folder / parent}: no permission to list this folder. Give it (chmod +rx), or move the folder "
                "away."
            )
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = f"{parent}/{entry.name}" if parent else entry.name
            stem, dot, suffix = entry.name.rpartition(".")
            suffix = dot + suffix.lower() if stem else ""
            if suffix not in wanted and entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and _is(entry.is_dir):
                found.folder_links.append(path)
            elif suffix in wanted:
                if fault := _fault(entry):
                    found.faults.append(f"{found.folder / path}: {fault}")
                else:
                    found.num_files += 1
                    yield path
            elif _is(entry.is_file):
                found.num_files += 1
                found.others[suffix or "no suffix"] += 1


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:
        return False


def _fault(entry: os.DirEntry[str]) -> str | None:
    """What is wrong with an entry that has the name of an image or caption; a pipe would block its reader for ever."""
    try:
        if entry.is_file():
            if may_read(entry.path):
                return None
            return "no permission to read this file. Give it (chmod +r), or move the file away."
        mode = entry.stat().st_mode
        kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
        kind = next((kind for test, kind in kinds.items() if test(mode)), "a device")
    except FileNotFoundError:
        kind = "a link to a file that is not there"
    except PermissionError:
        return "a link to where there is no permission to look. Give it (chmod +x), or remove the link."
    except OSError:
        kind = "a link that leads back to itself"
    return f"is {kind}; expected a regular file under this name. Rename or remove it."


def _pair_by_stem(found: _Found, paths: Iterable[str]) -> None:
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_stem[plain_name(_stem(path))].append(path)
    for stem in sorted(by_stem):
        # What is done with is let go of, or there would be two of everything for a while.
        _pair_one_stem(found, _without_caches(found, by_stem.pop(stem)))


def _pair_by_number(found: _Found, paths: Iterable[str]) -> None:
    """Pair the image, the caption and the array whose names hold one number; names without a number stand alone."""
    by_number: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        numbers = re.findall("[0-9]+", _stem(path))
        if len(numbers) == 1:
            by_number[int(numbers[0])].append(path)
        elif numbers:
            found.faults.append(
                f"{found.folder / path}: holds {len(numbers)} numbers ({', '.join(numbers)}), so it is not clear by "
                "which it pairs. Expected one (--pair_by number). Rename it, or list the pairs in a table (--pairs)."
            )
        else:
            found.lone.append(path)
    for number in sorted(by_number):
        files = sorted(by_number.pop(number))
        kinds: dict[str, list[str]] = {"image": [], "caption": [], "array": []}
        for path in files:
            kinds["caption" if is_caption(path) else "array" if _in_cache(path) else "image"].append(path)
        if max(map(len, kinds.values())) > 1:
            found.faults.append(
                f"{found.folder}: the number {number} is in {len(files)} names, so it is not clear which belong "
                f"together:\n{_listed(files)}  Expected one image, one caption and one array in npz/ at most. Rename "
                "the others."
            )
            continue
        images, captions, arrays = kinds.values()
        found.caches.update(zip(images, arrays, strict=False))
        pixels = images or arrays
        if pixels and captions:
            found.pairs += zip(pixels, captions, strict=True)
        else:
            found.lone += pixels or captions


PAIRINGS: dict[PairBy, Callable[[_Found, Iterable[str]], None]] = {"stem": _pair_by_stem, "number": _pair_by_number}


def _stem(path: str) -> str:
    return posixpath.basename(path).rpartition(".")[0]


def _in_cache(path: str) -> bool:
    return path.startswith(CACHE) and is_npz(path)


def _listed(files: list[str]) -> str:
    more = f"  and {len(files) - NAMED} more.\n" if len(files) > NAMED else ""
    return "".join(f"  {path}\n" for path in files[:NAMED]) + more


def _without_caches(found: _Found, files: list[str]) -> list[str]:
    """The files of a stem but for the caches of its images, which are noted."""
    arrays = [path for path in files if _in_cache(path)]
    if not arrays:
        return files
    owners: dict[str, list[str]] = defaultdict(list)
    for path in files:
        if not is_caption(path) and not is_npz(path):
            owners[plain_name(cache_name(path))].append(path)
    for array in arrays:
        if len(images := owners[plain_name(array)]) == 1:
            found.caches[images[0]] = array
            files = [path for path in files if path != array]
    return files


def _pair_one_stem(found: _Found, files: list[str]) -> None:
    """Pair the files of one stem, deepest folder first; what finds no partner moves up."""
    if len(files) == 2 and is_caption(files[0]) != is_caption(files[1]):
        # Nearly every stem of nearly every folder: wherever the two lie, there is a folder above both.
        image, caption = sorted(files, key=is_caption)
        found.pairs.append((image, caption))
        return
    waiting: dict[str, list[str]] = defaultdict(list)
    for path in files:
        waiting[posixpath.dirname(path)].append(path)
    while waiting:
        deepest = max(map(_depth, waiting))
        for place in sorted(place for place in waiting if _depth(place) == deepest):
            here = waiting.pop(place)
            images = [path for path in here if not is_caption(path)]
            captions = [path for path in here if is_caption(path)]
            if images and captions:
                if len(here) > 2:
                    counts = f"{_number(images, 'image')} and {_number(captions, 'caption')}"
                    found.faults.append(
                        f"{found.folder / place}: one stem has {counts}, so it is not clear which belong together:\n"
                        f"{_listed(sorted(here))}  Expected one of each. Rename or remove the others."
                    )
                    return
                found.pairs.append((images[0], captions[0]))
            elif place:
                waiting[posixpath.dirname(place)] += here
            else:
                found.lone += here


def _number(files: list[str], noun: str) -> str:
    return f"{len(files)} {noun}" + ("" if len(files) == 1 else "s")


def _depth(place: str) -> int:
    return place.count("/") + 1 if place else 0
