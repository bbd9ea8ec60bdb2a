"""The files in a shard: where each lies in its tar, and their bytes. Nothing is extracted, unpickled or run.

Where they lie is read from the shard's index, ``SHARD.tar.json``, which `data shards` writes beside it; or from the
headers of the tar, once: what they say is kept in the user's cache.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_left
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np

from train_clip.data.images import MAX_BYTES
from train_clip.data.pairs import FlatStrings
from train_clip.errors import BadSample, MissingFile, UserError, first_line
from train_clip.files import IN_ROWS, IN_TAR, regular, write_text

TAR, INDEX = ".tar", ".json"
VERSION = 1  # of the index
OPENED = 32  # indices in memory, of about a hundred bytes a file: two windows of shards (pairs.py)
MAX_INDEX = 2**30  # bytes
REMOTE = ("s3", "gs", "gcs", "az", "abfs", "hf", "http", "https")  # of fsspec's, those that read files elsewhere
INTACT = "Expected the shard as it was when its index was written: copy it again, or remove the index"


Members = dict[str, tuple[int, int]]  # a file's name → where it begins, and its bytes


class Index(NamedTuple):
    """What a shard holds."""

    size: int  # bytes of the tar
    sha256: str  # of the tar, in hexadecimal; empty where nobody has computed it
    names: FlatStrings  # of regular files, sorted
    places: np.ndarray  # (M, 2) int64: where each begins, and its bytes
    stamp: str  # changes when the shard does, or what it was written from
    repeated: list[str]  # names that occur more than once
    lost: list[str]  # pairs that were left out when it was written


def open_member(path: str) -> io.BufferedReader:
    """Open a file in a shard, SHARD.tar!NAME.

    Raises:
        BadSample: it is not in the shard, or too large.
        UserError: the shard is gone, or shorter than its index says.
    """
    shard, name = split_path(path)
    index = index_of(shard)
    row = bisect_left(index.names, name)
    if row == len(index.names) or index.names[row] != name:
        raise BadSample(path, "not in its shard")
    start, length = index.places[row].tolist()
    if length > MAX_BYTES:
        raise BadSample(path, f"file over {MAX_BYTES:,} bytes")
    content = read_bytes(shard, start, start + length)
    if len(content) > length:
        raise UserError(f"{shard}: its server sends the whole file where a part is asked for. Download the shards.")
    if len(content) < length:
        raise UserError(f"{shard}: ends before {name} does, which lies at byte {start:,}. {INTACT}.")
    return io.BufferedReader(io.BytesIO(content))


def split_path(path: str) -> tuple[str, str]:
    """SHARD.tar!NAME → the shard and the name; a ``Path`` has left one slash of an address's two."""
    shard, _, name = path.partition(IN_TAR)
    return re.sub(r"^(\w+):/(?!/)", r"\1://", shard) + TAR, name


def stamp_of(path: str) -> str:
    """What changes when a file does, or the shard that it is in; empty where there is none."""
    if IN_TAR in path:
        index = index_of(split_path(path)[0])
        return f"{index.size} {index.sha256 or index.stamp}"
    if IN_ROWS in path:
        return str(resolve_name("train_clip.shards.dataset:rows_of")(path.rpartition(IN_ROWS)[0])._fingerprint)
    with suppress(OSError, ValueError):
        found = os.stat(path)  # noqa: PTH116, a quarter of the time
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return ""


def file_system(path: str) -> tuple[Any, str]:
    """Fsspec's file system of a path or an address, and what it is called there; others than ``REMOTE`` are refused."""
    from fsspec.core import url_to_fs

    kind = path.partition("://")[0] if "://" in path else ""
    if (kind and kind not in REMOTE) or path.startswith("pipe:"):
        raise UserError(
            f"{path}: is not read. Expected a local path, or an address that begins with {', '.join(REMOTE)}; no "
            "command is run."
        )
    try:
        system, name = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}.") from error
    return system, str(name)


def read_bytes(path: str, start: int = 0, stop: int | None = None) -> bytes:
    """Read a part of a file, as far as it goes, or all of an index.

    Raises:
        MissingFile: there is none.
        UserError: it cannot be read, or is larger than any index.
    """
    try:
        if "://" in path:
            system, name = file_system(path)
            if stop is None and system.size(name) > MAX_INDEX:
                raise UserError(f"{path}: is over {MAX_INDEX:,} bytes.")
            content: bytes = system.cat_file(name, start=start or None, end=stop)
            return content
        with open(path, "rb", opener=regular) as file:
            file.seek(start)
            return file.read(MAX_INDEX if stop is None else stop - start)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file (any more). Bring it back.") from error
    except UserError:
        raise
    except Exception as error:  # of any library below fsspec
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)}).") from error


@lru_cache(OPENED)
def index_of(shard: str) -> Index:
    """Find where the files of a shard lie, by its index, by the cache, or by its headers.

    Raises:
        UserError: it is gone, no tar, truncated, or has not the size that its index says.
    """
    size, stamp = _state(shard)
    kept = _cache_of(shard)
    for file, expected in ((f"{shard}{INDEX}", None), (os.fspath(kept), stamp)):
        with suppress(MissingFile):
            found = parse_index(file, read_bytes(file))
            if expected is None and found.size != size:
                raise UserError(f"{shard}: has {size:,} bytes; its index says {found.size:,}. {INTACT} ({file}).")
            if expected in (None, found.stamp):
                return found
    members, repeated = read_headers(shard, size)
    text = index_text(members, size=size, stamp=stamp, repeated=repeated)
    with suppress(OSError):  # a cache that cannot be written is none
        write_text(kept, text)
    return parse_index(shard, text.encode())


def index_text(members: Members, **told: Any) -> str:
    """Write an index as it stands in its file, of its members and what else an ``Index`` has."""
    about = {"version": VERSION, "sha256": "", "repeated": [], "lost": []} | told
    return json.dumps(about | {"members": dict(sorted(members.items()))}) + "\n"


def parse_index(file: str, content: bytes) -> Index:
    """Read what ``index_text`` has written; whatever else it is, a ``UserError``."""
    try:
        told = json.loads(content)
        members, size = told["members"], int(told["size"])
        places = np.array(list(members.values()), np.int64).reshape(-1, 2)
        if told["version"] != VERSION or (places < 0).any() or (places.sum(axis=1) > size).any():
            raise ValueError("another version, or files beyond the end of the shard")
        if (names := [*members]) != sorted(names):
            raise ValueError("files that are not sorted")
        texts = [str(told[name]) for name in ("sha256", "stamp")]
        return Index(size, texts[0], FlatStrings(names), places, texts[1], [*told["repeated"]], [*told["lost"]])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{file}: is no index of a shard, or damaged ({first_line(error)}). Remove it: it is made again."
        ) from error


def read_headers(shard: str, size: int) -> tuple[Members, list[str]]:
    """Where each regular file in a tar lies, and its bytes; and the names that occur more than once."""
    members, repeated = Members(), list[str]()
    try:
        system, name = file_system(shard)
        with system.open(name, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    repeated += [member.name] * (member.name in members)
                    members[member.name] = (member.offset_data, member.size)
            # Where a header is damaged or cut, tarfile takes it for the end.
            file.seek(tar.offset)
            ends = file.read(tarfile.BLOCKSIZE)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{shard}: is no tar, or a damaged or truncated one ({first_line(error)}). Expected an uncompressed tar: "
            "copy or write it again."
        ) from error
    if ends != bytes(tarfile.BLOCKSIZE) or any(sum(place) > size for place in members.values()):
        raise UserError(
            f"{shard}: is truncated or damaged behind {len(members):,} files, at byte {tar.offset:,} of {size:,}. Copy "
            "or write it again."
        )
    return members, repeated


def _state(shard: str) -> tuple[int, str]:
    """A shard's bytes, and what changes when it does."""
    try:
        system, name = file_system(shard)
        found = system.info(name)
    except FileNotFoundError as error:
        raise MissingFile(f"{shard}: there is no such shard (any more). Bring it back.") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{shard}: cannot be looked up ({type(error).__name__}: {first_line(error)}).") from error
    if found["type"] != "file" or found.get("size") is None:
        raise UserError(f"{shard}: is no regular file whose size is known. Expected a tar.")
    changes = [found.get(key) for key in ("size", "mtime", "ETag", "etag", "LastModified", "updated")]
    return int(found["size"]), json.dumps([str(one) for one in changes])


def _cache_of(shard: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111, never raises
    name = shard if "://" in shard else os.path.abspath(shard)  # noqa: PTH100
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return folder / "train-clip" / "shards" / f"{digest}{INDEX}"
