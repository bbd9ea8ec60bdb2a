"""Files that are complete or absent: written next to the target, synced, renamed. Whose a folder is; what is read."""

import errno
import io
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from train_clip.errors import MissingFile, UserError

# The most that is read of a text, whatever holds it, and no more than that is in memory: the rest is something else.
MAX_CAPTIONS = 2**20  # bytes of a file of captions, of class names or of templates; of a caption in a table
MAX_ROW = 2**24  # characters of a table's row, over all of its lines
MAX_PATH = 4096  # bytes of a path in a table
MAX_YAML = 2**16  # bytes of options or of a model's configuration
BESIDE = ".tmp-"  # and the process's number, behind the target's name
PATIENCE = 50  # tenths of a second, for others to close a file
IN_TAR = ".tar!"  # between a shard and the name of a file in it
IN_ROWS = "/#"  # between a data set and the column and row of an image in it
LOCK = ".lock"  # in a folder that a process holds
LOCKED = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what systems say of a file that another process has locked


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write to the path that this yields, a file or a folder: the target appears only once all of it is on disk."""
    require_place(target)
    # In the same folder, so that the rename stays within one file system.
    beside = target.with_name(f"{target.name}{BESIDE}{os.getpid()}")
    try:
        yield beside
        for written in (*beside.glob("*"), beside):
            _share(written)
            _sync(written)
        _replace(beside, target)
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


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """Read keys and values; the message says what was ``expected`` where a file holds none, or is over ``MAX_YAML``."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML + 1)
        if len(content) > MAX_YAML:
            raise ValueError(f"over {MAX_YAML:,} bytes")
        values = yaml.load(content.decode(errors="replace"), _WithoutAliases)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not YAML ({error})"
        kind = MissingFile if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{path}: {reason}. Expected {expected}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}. Expected {expected}.")
    return values


class _WithoutAliases(yaml.SafeLoader):
    def compose_node(self, *place: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # A few of them stand for any number of values.
            raise yaml.YAMLError(f"*{self.peek_event().anchor} stands for other values: write them out")
        return super().compose_node(*place)


def link(source: Path, target: Path) -> None:
    """Give a file a further name, replacing what had that name: a hard link, or a copy where there are none."""
    with replacing(target) as beside:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def require_writable(folder: Path, instead: str = "give another --output") -> None:
    """Try whether files can be made in a folder, or in the nearest above it that there is."""
    there = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(
            f"{there}: no file can be written there ({error.strerror}). Allow writing, or {instead}."
        ) from error


def require_new(*targets: Path) -> None:
    """Refuse to overwrite what is there already."""
    if there := ", ".join(str(target) for target in targets if target.exists()):
        raise UserError(f"{there}: already exists, and is not overwritten. Give another name, or remove it.")


def require_no_others(folder: Path, *own: str) -> None:
    """Refuse a folder that holds anything but hidden files and those of our ``own`` names: it is the user's."""
    for one in folder.iterdir() if folder.is_dir() else ():
        if not any(one.match(name) for name in (".*", f"*{BESIDE}*", *own)):
            raise UserError(
                f"{folder}: holds {one.name!r} already, and the output files would be mixed with what is there. "
                "Expected a new or an empty folder; give another --output."
            )


def opened(path: str) -> io.BufferedReader:
    """Open one of a user's files to be read: a regular one, or one that is a part of another."""
    if (reader := inside(path)) is None:
        return open(path, "rb", opener=regular)
    part: io.BufferedReader = resolve_name(reader)(path)
    return part


def inside(path: str) -> str | None:
    """What opens a path in a shard, SHARD.tar!NAME, or in a data set, SPEC/#COLUMN-ROW; None for a file of its own."""
    if IN_TAR in path:
        return "train_clip.shards.members:open_member"
    return "train_clip.shards.dataset:open_row" if IN_ROWS in path else None


def regular(path: str, flags: int) -> int:
    """For ``open(path, opener=regular)``, of a user's files: a FIFO in a file's place would block for ever."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    kind = os.fstat(handle).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a folder ``open`` itself refuses
        os.close(handle)
        raise FileExistsError(errno.EEXIST, "is not a regular file", str(path))
    return handle


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, until the block ends or this process, in whatever way.

    Where the disk has no locks, or where they do not reach other hosts, by who has left a name in the file.
    """
    lock = folder / LOCK
    with lock.open("a+", encoding="utf-8") as file:
        file.seek(0)
        holder = file.read()
        try:
            _lock(file.fileno())
            # Or it was removed after it had been opened here: by a run that has ended just now.
            is_locked = os.fstat(file.fileno()).st_nlink == 0
        except OSError as error:
            if not (is_locked := error.errno in LOCKED or (holder != "" and not _is_dead(holder))):
                warnings.warn(f"{folder}: its disk has no locks. Start no second run there.", stacklevel=3)
        if is_locked:
            raise UserError(
                f"{folder}: in use by another run ({holder or 'which is starting or ending'}). Wait for its end, or "
                f"give another --output. If that process is dead, perhaps with its host, remove {lock}."
            )
        if holder and f" on {platform.node()} " not in holder:
            warnings.warn(
                f"{folder}: {holder} has not given it back. It was killed, or it still runs and locks on this disk do "
                "not reach from host to host: then stop one of the two runs.",
                stacklevel=3,
            )
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
            yield
        finally:
            with suppress(OSError):  # Windows removes no file that is open
                lock.unlink()


def sweep(folder: Path, age: float = 0.0) -> None:
    """Remove what ``replacing`` has left in a folder where the process was killed, so many seconds ago at least."""
    for left in folder.glob(f"*{BESIDE}*"):
        with suppress(FileNotFoundError):  # others sweep too
            is_old = not age or time.time() - left.stat().st_mtime >= age
            if is_old and left.name.rpartition(BESIDE)[2].isdigit():
                left.unlink()


def _replace(beside: Path, target: Path) -> None:
    # Windows replaces no file that somebody reads, such as a virus scanner or `evaluate`, and so it waits for a while.
    for _ in range(PATIENCE if sys.platform == "win32" else 0):
        with suppress(PermissionError):
            beside.replace(target)
            return
        time.sleep(0.1)
    beside.replace(target)


def _share(path: Path) -> None:
    # What a library, as safetensors does, has made for the user's eyes alone becomes readable as the umask has it.
    if path.is_file() and not path.stat().st_mode & 0o077:
        os.umask(mask := os.umask(0o077))
        path.chmod(0o666 & ~mask)


def _is_dead(holder: str) -> bool:
    # As far as this host knows; without /proc it would be the user who does.
    number, host = holder.split()[1:4:2]
    return host == platform.node() and not Path("/proc", number).exists()


def _lock(handle: int) -> None:
    # By process: one that a run has forked, and that outlives it, holds nothing.
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # behind what is to be read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(path: Path) -> None:
    # Windows cannot open a folder, and needs no sync of one.
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
