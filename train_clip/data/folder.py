"""A folder of images and captions → pairs: a walk through whatever lies there, and pairing by what names share.

``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder; where a stem occurs more than once, the files
with the nearest common ancestor belong together. By number ``image1.jpg`` and ``text1.txt`` are one.
``npz/cat.npz`` is the cache of ``cat.jpg`` or ``img/cat.jpg``, and ``npz/u/cat.npz`` that of ``u/cat.jpg``: it is read
in its image's place, and the pair is still known by its image. Any other array is an image like others.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from train_clip.data.images import ARRAY_SUFFIX, image_suffixes, is_npz
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, DEFAULTS, READABLE, Scan, advice_on, fault_of, path_advice
from train_clip.errors import MissingFile, UserError
from train_clip.options import SourceOptions
from train_clip.printing import printable

NAMED = 6  # files in the message on a stem
CACHE, IMAGES = "npz/", "img/"  # folders that have a meaning, where they lie at the top

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
            advice = advice_on([folder.suffix.lower()]) if folder.is_file() else path_advice(str(folder))
            raise (UserError if folder.exists() else MissingFile)(
                f"{folder}: {'is no folder' if folder.exists() else 'there is no such folder'}. Expected images and "
                f"captions (.txt); for a table use --pairs.{advice}"
            )
    except PermissionError:
        raise UserError(f"{folder}: no permission to open its parent folder. Allow it (chmod +x).") from None
    root = os.path.join(folder, "")  # noqa: PTH118, with its separator at the end
    scan = Scan(folder, 0, PairList(root), [], [], pair_by=options.pair_by)
    groups = _groups(scan)
    rows: list[Row] = []
    for shared in sorted(groups):
        # What is done with is let go of, or there would be two of everything for a while.
        rows += _pair(scan, shared, groups.pop(shared))
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
    return path.lower().endswith(CAPTION_SUFFIX)


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
                f"{printable(scan.source / path)}: holds {len(numbers)} numbers ({', '.join(numbers)}), so it is not "
                "clear which one pairs it. Expected one number (--pair_by number). Rename it, or list the pairs in a "
                "table (--pairs)."
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
            lacking = "no permission to list this folder. Allow it (chmod +rx), or move the folder away."
            scan.faults.append(f"{printable(scan.source / parent)}: {lacking}")
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
                if fault := fault_of(entry.path, entry.is_file(follow_symlinks=False)):
                    scan.faults.append(f"{printable(scan.source / path)}: {fault}; {READABLE}. Rename or remove it.")
                else:
                    scan.num_entries += 1
                    yield path
            elif os.path.isfile(entry.path):  # noqa: PTH113, likewise
                scan.num_entries += 1
                scan.others[suffix or "no suffix"] += 1


def _leave_alone(scan: Scan, paths: list[str]) -> None:
    for path in paths:
        (scan.lone_captions if is_caption(path) else scan.lone_images).append(path)


def _pair(scan: Scan, shared: str | int, files: list[str]) -> Iterator[Row]:
    """Pair the files of one stem, deepest folder first, where what finds no partner moves up; or those of a number."""
    if len(files) == 2 and is_caption(files[0]) != is_caption(files[1]):
        # Nearly every stem of nearly every folder: wherever the two lie, there is a folder above both.
        image, caption = sorted(files, key=is_caption)
        yield image, caption, ""
        return
    caches = _caches(scan, files)
    arrays = set(caches.values())
    waiting: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in files:
        if path not in arrays:
            waiting[tuple(path.split("/")[:-1]) if scan.pair_by == "stem" else ()].append(path)
    for depth in range(max(map(len, waiting)), -1, -1):
        for place in sorted(place for place in waiting if len(place) == depth):
            here = sorted(waiting.pop(place), key=is_caption)
            captions = sum(map(is_caption, here))
            if captions == 1 and len(here) == 2:
                yield here[0], here[1], caches.get(here[0], "")
            elif 0 < captions < len(here):
                listed = "\n  ".join([*map(printable, sorted(here)[:NAMED]), *["…"] * (len(here) > NAMED)])
                scan.faults.append(
                    f"{printable(scan.source.joinpath(*place))}: the {scan.pair_by} {printable(shared)} is in "
                    f"{len(here)} names, so it is not clear which files form a pair:\n  {listed}\n  Expected one image "
                    "and one caption, and at most one array in npz/. Rename or remove the others."
                )
                return
            elif place:
                waiting[place[:-1]] += here
            else:
                _leave_alone(scan, here)


def _caches(scan: Scan, files: list[str]) -> dict[str, str]:
    """The array in npz/ of each image that has one, by the image's name: by number, whatever the two are called."""
    together: dict = defaultdict(list)
    for path in files:
        is_cache = path.startswith(CACHE) and is_npz(path)
        if is_cache or not (is_npz(path) or is_caption(path)):
            name = plain_name(path if is_cache else cache_name(path))
            together[name if scan.pair_by == "stem" else ""].append(path)
    sets = (sorted(some, key=is_npz) for some in together.values() if sum(map(is_npz, some)) == 1)
    return {some[0]: some[1] for some in sets if len(some) == 2}
