"""A folder of images and captions → pairs: a walk through it that meets whatever lies in folders."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train_clip.data import npz
from train_clip.data.images import image_suffixes
from train_clip.data.pairing import PAIRINGS, is_caption
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.scan import CAPTION_SUFFIX, PairBy, Scan, may_read
from train_clip.errors import UserError


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
