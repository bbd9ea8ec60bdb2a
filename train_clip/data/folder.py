"""A folder of images and captions → pairs, by stem.

``cat.jpg`` and ``cat.txt`` are a pair wherever they lie below the folder. Where a stem occurs more than once, the files
with the nearest common ancestor belong together. Nothing is decoded here: only names are read.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from train_clip.errors import UserError

CAPTION_SUFFIX = ".txt"


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
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Expected a folder of images and captions (.txt).")
    by_stem: dict[str, list[str]] = defaultdict(list)
    num_files = 0
    for path in _files(folder):
        num_files += 1
        if _is_image(path) or _is_caption(path):
            by_stem[PurePosixPath(path).stem].append(path)
    pairs: list[Pair] = []
    lone: list[str] = []
    for stem in sorted(by_stem):
        found, left = _pair_stem(folder, by_stem[stem])
        pairs += found
        lone += left
    return FolderScan(
        folder,
        num_files,
        sorted((_absolute(folder, pair) for pair in pairs), key=lambda pair: pair.image),
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
        Those to train on, and round(share · len(pairs)) to validate on.
    """
    names = [Path(pair.image).relative_to(folder).as_posix() for pair in pairs]
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    order = sorted(range(len(pairs)), key=hashes.__getitem__)
    held_out = set(order[: round(share * len(pairs))])
    training = [pair for index, pair in enumerate(pairs) if index not in held_out]
    return training, [pairs[index] for index in sorted(held_out)]


def _files(folder: Path) -> Iterator[str]:
    """Regular files below the folder as relative POSIX paths."""
    folders = [""]
    while folders:
        parent = folders.pop()
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                path = f"{parent}/{entry.name}" if parent else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                # A pipe or a socket would block the reader for ever.
                elif entry.is_file():
                    yield path


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
    return PurePosixPath(path).suffix.casefold() in _image_suffixes()


def _is_caption(path: str) -> bool:
    return PurePosixPath(path).suffix.casefold() == CAPTION_SUFFIX


@cache
def _image_suffixes() -> frozenset[str]:
    """Every suffix that Pillow can open as a picture."""
    video_and_print = {".mpg", ".mpeg", ".pdf", ".eps", ".ps"}
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and suffix not in video_and_print
    )


def _ambiguous(folder: Path, place: PurePosixPath, images: list[str], captions: list[str]) -> str:
    kinds = "images" if len(images) > 1 else "captions"
    listed = "\n".join(f"  {path}" for path in sorted(images + captions)[:6])
    return (
        f"{folder / place}: {len(images)} images and {len(captions)} captions share one stem, so it is not clear which "
        f"belong together:\n{listed}\n  Expected one of each. Rename or remove the other {kinds}."
    )
