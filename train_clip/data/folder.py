"""A folder of images and captions → pairs: a walk through whatever lies there, and pairing by what names share.

``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder; where a stem occurs more than once, the files
with the nearest common ancestor belong together. By number ``image1.jpg`` and ``text1.txt`` are one.
``npz/cat.npz`` is the cache of ``cat.jpg`` or ``img/cat.jpg``, and ``npz/u/cat.npz`` that of ``u/cat.jpg``: it is read
in its image's place, and the pair is still known by its image. Any other array is an image like others.
"""

import os
import posixpath
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train_clip.data.images import ARRAY_SUFFIX, image_suffixes, is_npz
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, DEFAULTS, Scan, may_read
from train_clip.errors import UserError
from train_clip.options import SourceOptions

NAMED = 6  # files in the message on a stem
CACHE, IMAGES = "npz/", "img/"  # folders that have a meaning, where they lie at the top


def scan_folder(folder: Path, options: SourceOptions = DEFAULTS) -> Scan:
    """Pair the images and captions below a folder, by what the options say that their names share.

    Hidden names and ``__MACOSX`` are passed over, and links to folders are not followed. Faults are names of which it
    is not clear which belong together, what may not be read, and what has an image's or caption's name but is no file.

    Raises:
        UserError: no such folder.
    """
    try:
        if not folder.is_dir():
            table = " A table of pairs is given by --pairs." if folder.is_file() else ""
            raise UserError(f"{folder}: there is no such folder. Expected one of images and captions (.txt).{table}")
    except PermissionError:
        raise UserError(f"{folder}: no permission to look into the folder above it. Give it (chmod +x).") from None
    found = _Found(folder)
    pair = _pair_by_stem if options.pair_by == "stem" else _pair_by_number
    pair(found, _images_and_captions(found))
    pairs = sorted(found.pairs, key=lambda pair: plain_name(pair[0]))
    root = os.path.join(folder, "")  # noqa: PTH118, with its separator at the end
    caches = (found.caches.get(image, "") for image, _ in pairs) if found.caches else ()
    return Scan(
        folder,
        found.num_files,
        PairList(root, (image for image, _ in pairs), (caption for _, caption in pairs), caches),
        sorted(path for path in found.lone if not is_caption(path)),
        sorted(filter(is_caption, found.lone)),
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
    wanted = image_suffixes() | {ARRAY_SUFFIX, CAPTION_SUFFIX}
    folders = [""]
    while folders:
        parent = folders.pop()
        try:
            entries = list(os.scandir(found.folder / parent))
        except PermissionError:
            lacking = "no permission to list this folder. Give it (chmod +rx), or move the folder away."
            found.faults.append(f"{found.folder / parent}: {lacking}")
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = f"{parent}/{entry.name}" if parent else entry.name
            suffix = posixpath.splitext(entry.name)[1].lower()
            if suffix not in wanted and entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112, False where one may not look
                found.folder_links.append(path)
            elif suffix in wanted:
                if fault := _fault(entry):
                    found.faults.append(f"{found.folder / path}: {fault}")
                else:
                    found.num_files += 1
                    yield path
            elif os.path.isfile(entry.path):  # noqa: PTH113, likewise
                found.num_files += 1
                found.others[suffix or "no suffix"] += 1


def _fault(entry: os.DirEntry[str]) -> str | None:
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


def _stem(path: str) -> str:
    return posixpath.basename(path).rpartition(".")[0]


def _in_cache(path: str) -> bool:
    return path.startswith(CACHE) and is_npz(path)


def _listed(files: list[str]) -> str:
    more = f"  and {len(files) - NAMED} more.\n" if len(files) > NAMED else ""
    return "".join(f"  {path}\n" for path in files[:NAMED]) + more


def _without_caches(found: _Found, files: list[str]) -> list[str]:
    """The files of a stem but for the caches of its images, which are noted."""
    if not (arrays := [path for path in files if _in_cache(path)]):
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
    waiting: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in files:
        waiting[tuple(path.split("/")[:-1])].append(path)
    while waiting:
        deepest = max(map(len, waiting))
        for place in sorted(place for place in waiting if len(place) == deepest):
            here = sorted(waiting.pop(place), key=is_caption)
            captions = sum(map(is_caption, here))
            images = len(here) - captions
            if images == captions == 1:
                found.pairs.append((here[0], here[1]))
            elif images and captions:
                found.faults.append(
                    f"{found.folder.joinpath(*place)}: one stem has {images} image{'s'[: images - 1]} and {captions} "
                    f"caption{'s'[: captions - 1]}, so it is not clear which belong together:\n"
                    f"{_listed(sorted(here))}  Expected one of each. Rename or remove the others."
                )
                return
            elif place:
                waiting[place[:-1]] += here
            else:
                found.lone += here
