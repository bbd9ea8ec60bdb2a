"""Files that are complete or absent: written next to the target, synced, renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BESIDE = ".tmp-"  # and the process's number, behind the target's name


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write to the path that this yields, a file or a folder: the target appears only once all of it is on disk."""
    require_place(target)
    # In the same folder, so that the rename stays within one file system.
    beside = target.with_name(f"{target.name}{BESIDE}{os.getpid()}")
    try:
        yield beside
        for written in (*beside.glob("*"), beside):
            _sync(written)
        beside.replace(target)
        _sync(target.parent)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def require_place(target: Path) -> None:
    """See to it that a file can stand there, in the place of no folder or device, and make its folder."""
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "is not a regular file", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text completely or not at all."""
    with replacing(target) as beside:
        beside.write_text(text, encoding="utf-8")


def link(source: Path, target: Path) -> None:
    """Give a file a further name, replacing what had that name: a hard link, or a copy where there are none."""
    with replacing(target) as beside:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def sweep(folder: Path) -> None:
    """Remove what ``replacing`` has left in a folder where the process was killed."""
    for left in folder.glob(f"*{BESIDE}*"):
        if left.name.rpartition(BESIDE)[2].isdigit():
            left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Windows cannot open a folder, and needs no sync of one.
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
