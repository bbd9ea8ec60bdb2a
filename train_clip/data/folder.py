"""A folder of images and captions → pairs: a walk through whatever lies there, and pairing by what names share.

``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder; where a stem occurs more than once, the files
with the nearest common ancestor belong together. By number ``image1.jpg`` and ``text1.txt`` are one.
``npz/cat.npz`` is the cache of ``cat.jpg`` or ``img/cat.jpg``, and ``npz/u/cat.npz`` that of ``u/cat.jpg``: it is read
in its image's place, and the pair is still known by its image. Any other array is an image like others.
"""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from train_clip.data.images import ARRAY_SUFFIX, image_suffixes, is_npz
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, DEFAULTS, Scan, may_read
from train_clip.errors import UserError
from train_clip.options import SourceOptions

NAMED = 6  # files in the message on a stem
CACHE, IMAGES = "npz/", "img/"  # folders that have a meaning, where they lie at the top
KINDS = {"d": "a folder", "p": "a pipe", "s": "a socket"}  # by the letter that `ls -l` begins with

Row = tuple[str, str, str]  # names of an image, of its file of captions and of its array, which may be empty


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
    root = os.path.join(folder, "")  # noqa: PTH118, with its separator at the end
    scan = Scan(folder, 0, PairList(root), [], [], pair_by=options.pair_by)
    pair = _pair_by_stem if options.pair_by == "stem" else _pair_by_number
    groups = _groups(scan)
    rows: list[Row] = []
    for shared in sorted(groups):
        # What is done with is let go of, or there would be two of everything for a while.
        rows += pair(scan, shared, groups.pop(shared))
    rows.sort(key=lambda row: plain_name(row[0]))
    scan.pairs = PairList(root, *zip(*rows, strict=True))
    for names in (scan.lone_images, scan.lone_captions, scan.faults, scan.folder_links):
        names.sort()
    return scan


def cache_name(image: str) -> str:
    """Where the cache of an image lies, both as POSIX paths below one folder."""
    return f"{CACHE}{image.removeprefix(IMAGES).rpartition('.')[0]}{ARRAY_SUFFIX}"


def is_caption(path: str) -> bool:
    """Whether a file holds captions, by its name."""
    return path[-len(CAPTION_SUFFIX) :].lower() == CAPTION_SUFFIX


def _groups(scan: Scan) -> dict:
    """The images and captions that share a stem or number, as relative POSIX paths."""
    groups: dict = defaultdict(list)
    for path in _images_and_captions(scan):
        stem = path.rpartition("/")[2].rpartition(".")[0]
        if scan.pair_by == "stem":
            groups[plain_name(stem)].append(path)
            continue
        numbers = re.findall("[0-9]+", stem)
        if len(numbers) == 1:
            groups[int(numbers[0])].append(path)
        elif numbers:
            scan.faults.append(
                f"{scan.source / path}: holds {len(numbers)} numbers ({', '.join(numbers)}), so it is not clear by "
                "which it pairs. Expected one (--pair_by number). Rename it, or list the pairs in a table (--pairs)."
            )
        else:
            _leave_alone(scan, [path])
    return groups


def _images_and_captions(scan: Scan) -> Iterator[str]:
    wanted = image_suffixes() | {ARRAY_SUFFIX, CAPTION_SUFFIX}
    folders = [""]
    while folders:
        parent = folders.pop()
        try:
            entries = list(os.scandir(scan.source / parent))
        except PermissionError:
            lacking = "no permission to list this folder. Give it (chmod +rx), or move the folder away."
            scan.faults.append(f"{scan.source / parent}: {lacking}")
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = parent + entry.name
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122, a third of the time
            if suffix not in wanted and entry.is_dir(follow_symlinks=False):
                folders.append(path + "/")
            elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112, False where one may not look
                scan.folder_links.append(path)
            elif suffix in wanted:
                if fault := _fault(entry):
                    scan.faults.append(f"{scan.source / path}: {fault}")
                else:
                    scan.num_entries += 1
                    yield path
            elif os.path.isfile(entry.path):  # noqa: PTH113, likewise
                scan.num_entries += 1
                scan.others[suffix or "no suffix"] += 1


def _fault(entry: os.DirEntry[str]) -> str | None:
    try:
        if entry.is_file():
            if may_read(entry.path):
                return None
            return "no permission to read this file. Give it (chmod +r), or move the file away."
        kind = KINDS.get(stat.filemode(entry.stat().st_mode)[0], "a device")
    except FileNotFoundError:
        kind = "a link to a file that is not there"
    except PermissionError:
        return "a link to where there is no permission to look. Give it (chmod +x), or remove the link."
    except OSError:
        kind = "a link that leads back to itself"
    return f"is {kind}; expected a regular file under this name. Rename or remove it."


def _leave_alone(scan: Scan, paths: list[str]) -> None:
    for path in paths:
        (scan.lone_captions if is_caption(path) else scan.lone_images).append(path)


def _in_cache(path: str) -> bool:
    return path.startswith(CACHE) and is_npz(path)


def _listed(files: list[str]) -> str:
    more = f"  and {len(files) - NAMED} more.\n" if len(files) > NAMED else ""
    return "".join(f"  {path}\n" for path in files[:NAMED]) + more


def _pair_by_number(scan: Scan, number: int, files: list[str]) -> Iterator[Row]:
    files.sort()
    captions = [path for path in files if is_caption(path)]
    arrays = [path for path in files if _in_cache(path)]
    images = [path for path in files if path not in (*captions, *arrays)]
    pixels = images or arrays
    if max(map(len, (images, captions, arrays))) > 1:
        scan.faults.append(
            f"{scan.source}: the number {number} is in {len(files)} names, so it is not clear which belong "
            f"together:\n{_listed(files)}  Expected one image, one caption and one array in npz/ at most. Rename "
            "the others."
        )
    elif pixels and captions:
        yield pixels[0], captions[0], "".join(arrays if images else ())
    else:
        _leave_alone(scan, pixels or captions)


def _pair_by_stem(scan: Scan, _: str, files: list[str]) -> Iterator[Row]:
    """Pair the files of one stem, deepest folder first; what finds no partner moves up."""
    if len(files) == 2 and is_caption(files[0]) != is_caption(files[1]):
        # Nearly every stem of nearly every folder: wherever the two lie, there is a folder above both.
        image, caption = sorted(files, key=is_caption)
        yield image, caption, ""
        return
    owners = _owners(files)
    caches = {image: array for array, image in owners.items()}
    waiting: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in files:
        if path not in owners:
            waiting[tuple(path.split("/")[:-1])].append(path)
    for depth in range(max(map(len, waiting)), -1, -1):
        for place in sorted(place for place in waiting if len(place) == depth):
            here = sorted(waiting.pop(place), key=is_caption)
            captions = sum(map(is_caption, here))
            pictures = len(here) - captions
            if pictures == captions == 1:
                yield here[0], here[1], caches.get(here[0], "")
            elif pictures and captions:
                scan.faults.append(
                    f"{scan.source.joinpath(*place)}: one stem has {pictures} image{'s'[: pictures - 1]} and "
                    f"{captions} caption{'s'[: captions - 1]}, so it is not clear which belong together:\n"
                    f"{_listed(sorted(here))}  Expected one of each. Rename or remove the others."
                )
                return
            elif place:
                waiting[place[:-1]] += here
            else:
                _leave_alone(scan, here)


def _owners(files: list[str]) -> dict[str, str]:
    """The image that each array is the cache of."""
    images: dict[str, list[str]] = defaultdict(list)
    for path in files:
        if not is_caption(path) and not is_npz(path):
            images[plain_name(cache_name(path))].append(path)
    owners = {path: images[plain_name(path)] for path in files if _in_cache(path)}
    return {path: some[0] for path, some in owners.items() if len(some) == 1}
