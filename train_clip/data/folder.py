"""A folder of images and captions → pairs, by stem.

``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder. Where a stem occurs more than once, the files
with the nearest common ancestor belong together. Nothing is decoded here: only names are read.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from train_clip.data.images import image_formats
from train_clip.errors import UserError

CAPTION_SUFFIX = ".txt"
NAMED = 6  # files in a message


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its file of captions, as paths."""

    image: str
    caption: str


@dataclass(frozen=True)
class FolderScan:
    """What a folder holds.

    Args:
        folder: where it was looked for.
        num_files: regular files of any kind.
        pairs: in the order of the image's path, the same on every machine.
        lone_images: images without a caption, relative to the folder.
        lone_captions: captions without an image, likewise.
    """

    folder: Path
    num_files: int
    pairs: list[Pair]
    lone_images: list[str]
    lone_captions: list[str]

    def require_pairs(self) -> FolderScan:
        """Return itself.

        Raises:
            UserError: there is no pair. The message says what was found instead.
        """
        if self.pairs:
            return self
        lines = [f"{self.folder}: 0 pairs among {self.num_files:,} files."]
        if self.lone_images:
            example = self.lone_images[0]
            wanted = PurePosixPath(example).stem + CAPTION_SUFFIX
            lines.append(
                f"  Images without a caption: {len(self.lone_images):,}, for instance {example} (no {wanted})."
            )
        if self.lone_captions:
            example = self.lone_captions[0]
            lines.append(f"  Captions without an image: {len(self.lone_captions):,}, for instance {example}.")
        lines.append(
            "  A pair shares its stem: cat.jpg and cat.txt, one caption a line. Rename the files so that they do."
        )
        raise UserError("\n".join(lines))


def scan_folder(folder: Path) -> FolderScan:
    """Pair the images and captions below a folder.

    Args:
        folder: searched with its subfolders. Names that begin with a dot and ``__MACOSX`` are passed over, and links to
            folders are not followed.

    Raises:
        UserError: no such folder, or a stem with two images or two captions at the same place.
    """
    try:
        exists = folder.is_dir()
    except PermissionError:
        raise UserError(f"{folder}: no permission to look into the folder above it. Give it (chmod +x).") from None
    if not exists:
        raise UserError(f"{folder}: there is no such folder. Expected a folder of images and captions (.txt).")
    by_stem: dict[str, list[str]] = defaultdict(list)
    num_files = 0
    for path in _files(folder):
        num_files += 1
        if _is_image(path) or _is_caption(path):
            by_stem[posixpath.splitext(posixpath.basename(path))[0]].append(path)
    pairs: list[Pair] = []
    lone: list[str] = []
    for stem in sorted(by_stem):
        found, left = _pair_stem(folder, by_stem[stem])
        pairs += found
        lone += left
    return FolderScan(
        folder,
        num_files,
        [_absolute(folder, pair) for pair in sorted(pairs, key=lambda pair: pair.image)],
        sorted(path for path in lone if _is_image(path)),
        sorted(path for path in lone if _is_caption(path)),
    )


def split_pairs(pairs: Sequence[Pair], folder: Path, share: float) -> tuple[list[Pair], list[Pair]]:
    """Hold out a share of the pairs, chosen by a hash of the image's name below the folder.

    The choice depends on names alone: not on a seed, so that runs can be compared, nor on where the folder lies.

    Args:
        pairs: all of them.
        folder: what the names are relative to.
        share: in [0, 1).

    Returns:
        Those to train on, and round(share · len(pairs)) to validate on; none where that is a single one, among which
        retrieval is always right.

    Raises:
        UserError: the share is no such number.
    """
    if not 0 <= share < 1:
        raise UserError(f"val_share is {share}; expected a share from 0 (no validation) to below 1.")
    names = [Path(pair.image).relative_to(folder).as_posix() for pair in pairs]
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    order = sorted(range(len(pairs)), key=hashes.__getitem__)
    number = round(share * len(pairs))
    held_out = set(order[:number]) if number > 1 else set()
    training = [pair for index, pair in enumerate(pairs) if index not in held_out]
    return training, [pairs[index] for index in sorted(held_out)]


def _files(folder: Path) -> Iterator[str]:
    """Regular files below the folder as relative POSIX paths."""
    folders = [""]
    while folders:
        parent = folders.pop()
        try:
            entries = list(os.scandir(folder / parent))
        except PermissionError:
            raise UserError(
                f"{folder / parent}: no permission to list this folder. Give it (chmod +rx), or move the folder away."
            ) from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = f"{parent}/{entry.name}" if parent else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif _is_regular(entry):
                yield path


def _is_regular(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to one. A pipe or a socket would block the reader for ever."""
    try:
        return entry.is_file()
    except OSError:
        # A link to itself.
        return False


def _pair_stem(folder: Path, files: list[str]) -> tuple[list[Pair], list[str]]:
    """Pair the files of one stem, deepest folder first; what finds no partner moves up."""
    pairs: list[Pair] = []
    waiting: dict[PurePosixPath, list[str]] = defaultdict(list)
    for path in files:
        waiting[PurePosixPath(path).parent].append(path)
    lone: list[str] = []
    while waiting:
        place = max(waiting, key=lambda parent: (len(parent.parts), parent))
        here = waiting.pop(place)
        images, captions = [p for p in here if _is_image(p)], [p for p in here if _is_caption(p)]
        if images and captions:
            if len(here) > 2:
                raise UserError(_ambiguous(folder, place, images, captions))
            pairs.append(Pair(images[0], captions[0]))
        elif place == place.parent:
            lone += here
        else:
            waiting[place.parent] += here
    return pairs, lone


def _absolute(folder: Path, pair: Pair) -> Pair:
    return Pair(str(folder / pair.image), str(folder / pair.caption))


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].casefold() in _image_suffixes()


def _is_caption(path: str) -> bool:
    return posixpath.splitext(path)[1].casefold() == CAPTION_SUFFIX


@cache
def _image_suffixes() -> frozenset[str]:
    """Every suffix of the formats that are read."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in image_formats())


def _ambiguous(folder: Path, place: PurePosixPath, images: list[str], captions: list[str]) -> str:
    shown = sorted(images + captions)[:NAMED]
    listed = "\n".join(f"  {path}" for path in shown)
    more = len(images) + len(captions) - len(shown)
    return (
        f"{folder / place}: one stem has {_number(len(images), 'image')} and {_number(len(captions), 'caption')}, so "
        f"it is not clear which belong together:\n{listed}\n{f'  and {more} more.' + chr(10) if more else ''}"
        "  Expected one of each. Rename or remove the others."
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
