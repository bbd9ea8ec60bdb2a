"""The facts of an audit on disk, so that a scan of a million files takes no memory and need not be done twice.

One SQLite file a source. A pair's facts are taken again when the size or the time of one of its files has changed.

A pair → what is to be known of it before it is trained on: every file opened, decoded and hashed once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from train_clip.data.crops import read_picture
from train_clip.data.pairs import Pair, PairList, read_caption_lines
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import BadSample
from train_clip.types import Skip

BATCH = 16  # pairs that travel together from a worker


class CaptionFacts(NamedTuple):
    """One caption.

    Args:
        text: a digest of its words.
        tokens: a digest of its tokens: the same for captions that a model cannot tell apart.
        length: tokens, without start and end, uncut.
    """

    text: bytes
    tokens: bytes
    length: int


class PairFacts(NamedTuple):
    """One pair.

    Args:
        place: in the list of pairs.
        bad: its files that cannot be used.
        mended: what is mended whenever it is read.
        width: pixels of the upright image; 0 where it cannot be read.
        height: likewise.
        content: a digest of the image's file; empty where the image cannot be read.
        look: the 64 bits of its perceptual hash, as a signed number; None without the library.
        captions: all of them; none where they cannot be read.
    """

    place: int
    bad: tuple[Skip, ...]
    mended: tuple[str, ...]
    width: int
    height: int
    content: bytes
    look: int | None
    captions: tuple[CaptionFacts, ...]


def audit_loader(pairs: PairList, places: Sequence[int], num_workers: int) -> DataLoader[Any]:
    """Look at some of the pairs; yields lists of ``PairFacts`` in the order of the places."""
    audit = Audit(pairs, places, perceptual_hash())
    return DataLoader(audit, batch_size=BATCH, num_workers=num_workers, collate_fn=list)


class Audit(Dataset[PairFacts]):
    """The facts of pairs.

    Args:
        pairs: all there are.
        places: which of them to look at.
        look: a picture's perceptual hash; None to do without.
    """

    def __init__(
        self, pairs: PairList, places: Sequence[int], look: Callable[[Image.Image], int] | None = None
    ) -> None:
        self.pairs = pairs
        self.places = places
        self.look = look
        self.tokenizer = Tokenizer()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> PairFacts:
        """Look at the pair at place ``places[index]``."""
        place = self.places[index]
        pair = self.pairs[place]
        bad: list[Skip] = []
        captions, mended = self._captions(pair, bad)
        try:
            picture, image_mended = read_picture(pair.pixels)
            with open(pair.pixels, "rb") as file:  # noqa: PTH123, a third of the time
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except (BadSample, OSError) as error:
            reason = error.reason if isinstance(error, BadSample) else "file is gone"
            return PairFacts(place, (*bad, Skip(pair.pixels, reason)), mended, 0, 0, b"", None, captions)
        look = None if self.look is None else self.look(picture)
        mended = mended + image_mended
        return PairFacts(place, tuple(bad), mended, picture.width, picture.height, content, look, captions)

    def _captions(self, pair: Pair, bad: list[Skip]) -> tuple[tuple[CaptionFacts, ...], tuple[str, ...]]:
        try:
            texts, mended = (pair.captions(), ()) if pair.texts else read_caption_lines(pair.caption)
        except BadSample as error:
            bad.append(Skip(error.path, error.reason))
            return (), ()
        facts = []
        for text, ids in zip(texts, self.tokenizer.encode(texts), strict=True):
            tokens = np.array(ids, dtype="<u2").tobytes()
            facts.append(CaptionFacts(caption_digest(text), _short(tokens), len(ids)))
        return tuple(facts), mended


def caption_digest(text: str) -> bytes:
    """What stands for a caption's words."""
    return _short(text.encode("utf-8", "surrogatepass"))


def perceptual_hash() -> Callable[[Image.Image], int] | None:
    """ImageHash's pHash as a signed 64-bit number; None where the library is not installed."""
    return None if find_spec("imagehash") is None else _phash


def _phash(picture: Image.Image) -> int:
    import imagehash

    return int(np.packbits(imagehash.phash(picture).hash).view(">i8")[0])


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


FORMAT = 1  # to be raised when what is stored, or what is found bad, changes

# What may be otherwise the next time though the files have not changed.
PASSING = ("cannot be read", "file is gone", "no permission", "too large for memory")

TABLES = """
CREATE TABLE about (format TEXT);
CREATE TABLE pairs (id INTEGER PRIMARY KEY, name BLOB, stamp TEXT, place INTEGER,
                    width INTEGER, height INTEGER, content BLOB, look INTEGER);
CREATE TABLE bad (pair INTEGER, path BLOB, reason TEXT);
CREATE TABLE mended (pair INTEGER, what TEXT);
CREATE TABLE captions (pair INTEGER, text BLOB, tokens BLOB, length INTEGER);
CREATE INDEX named ON pairs (name);
CREATE INDEX bad_of ON bad (pair);
CREATE INDEX mended_of ON mended (pair);
CREATE INDEX captions_of ON captions (pair);
"""


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again.

    Raises:
        OSError: this user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-clip"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def is_damage(error: Exception) -> bool:
    """Whether an error says that a store's file is no longer whole."""
    code = getattr(error, "sqlite_errorcode", None)
    # The last byte, without what SQLite adds on where it was found.
    return code is not None and code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class AuditStore:
    """What is known of a source's pairs. One process has it at a time.

    ``place`` is a pair's place in the present list; facts of pairs that are no longer there are dropped.

    Args:
        sources: folder or table, and a table of pairs to validate on where there is one.
        folder: where stores are kept; None for one in memory.
    """

    def __init__(self, sources: Sequence[Path], folder: Path | None) -> None:
        self.file: Path | None = None
        if folder is not None:
            paths = [source.resolve() for source in sources]
            key = hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()[:16]
            self.file = folder / "scans" / f"{paths[0].name[:40]}-{key}.sqlite"
        self.database = self._open()

    def _open(self) -> sqlite3.Connection:
        """Open the store for this process alone, and begin anew where it is damaged or of another format.

        Raises:
            OSError, sqlite3.Error: another process has it, or it cannot be written.
        """
        if self.file is None:
            return self._ready(sqlite3.connect(":memory:"))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._ready(sqlite3.connect(self.file, timeout=0.0))
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self.file.unlink(missing_ok=True)
            return self._ready(sqlite3.connect(self.file, timeout=0.0))

    def _ready(self, database: sqlite3.Connection) -> sqlite3.Connection:
        """Take the store, for as long as it is open, and see to it that its tables are there."""
        about = json.dumps([FORMAT, PIL.__version__, perceptual_hash() is not None])
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if "about" not in tables or database.execute("SELECT format FROM about").fetchall() != [(about,)]:
            for table in tables:
                database.execute(f"DROP TABLE {table}")
            for statement in TABLES.split(";"):
                database.execute(statement)
        database.execute("DELETE FROM about")
        database.execute("INSERT INTO about VALUES (?)", (about,))
        database.commit()
        return database

    def close(self) -> None:
        """Let go of the file; each change is kept as it is made."""
        self.database.close()

    def unknown(self, pairs: PairList) -> list[int]:
        """Settle each pair's place, drop those that are gone or have changed, and say which are to be looked at."""
        places: list[int] = []
        with self.database as database:
            database.execute("UPDATE pairs SET place = NULL")
            for place, name in enumerate(pairs.names):
                # Lists for training and validation can name one image twice: each takes a row of its own.
                found = database.execute(
                    "UPDATE pairs SET place = ? WHERE id = "
                    "(SELECT id FROM pairs WHERE name = ? AND stamp = ? AND place IS NULL LIMIT 1)",
                    (place, _key(name), _stamp(pairs[place])),
                )
                if not found.rowcount:
                    places.append(place)
            for table in ("bad", "mended", "captions"):
                database.execute(f"DELETE FROM {table} WHERE pair IN (SELECT id FROM pairs WHERE place IS NULL)")
            database.execute("DELETE FROM pairs WHERE place IS NULL")
        return places

    def add(self, pairs: PairList, facts: Iterable[PairFacts]) -> None:
        """Keep the facts of pairs that were unknown."""
        with self.database as database:
            for one in facts:
                passing = any(part in reason for _, reason in one.bad for part in PASSING)
                row = (
                    _key(pairs.names[one.place]),
                    "" if passing else _stamp(pairs[one.place]),
                    one.place,
                    one.width,
                    one.height,
                    one.content,
                    one.look,
                )
                pair = database.execute(
                    "INSERT INTO pairs (name, stamp, place, width, height, content, look) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                ).lastrowid
                database.executemany(
                    "INSERT INTO bad VALUES (?, ?, ?)", ((pair, _key(path), reason) for path, reason in one.bad)
                )
                database.executemany("INSERT INTO mended VALUES (?, ?)", ((pair, what) for what in one.mended))
                database.executemany(
                    "INSERT INTO captions VALUES (?, ?, ?, ?)", ((pair, *caption) for caption in one.captions)
                )

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Ask the database."""
        return iter(self.database.execute(query, values))

    def one(self, query: str, *values: Any) -> tuple[Any, ...]:
        """Ask for a single row."""
        row: tuple[Any, ...] = self.database.execute(query, values).fetchone()
        return row


def _key(name: str) -> bytes:
    """A name as bytes: SQLite takes no text that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _stamp(pair: Pair) -> str:
    """What changes when a pair's files change; captions out of a table stand for themselves."""
    texts = hashlib.sha256("\n".join(pair.texts).encode("utf-8", "surrogatepass")).hexdigest() if pair.texts else ""
    return " ".join([texts, *(_file_stamp(path) for path in (pair.pixels, pair.caption) if path)])


def _file_stamp(path: str) -> str:
    try:
        found = os.stat(path)  # noqa: PTH116, a quarter of the time
    except (OSError, ValueError):
        return "gone"
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
