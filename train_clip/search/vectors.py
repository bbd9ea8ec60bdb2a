"""A file of embeddings with their keys, paths and captions: ``.parquet``, ``.npz`` or ``.npy``.

What is read or written at a time is a block; a matrix of a million rows is never in memory.

N  rows      n  rows of a block      D  embedding width
"""

import csv
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from train_clip.data.pairs import FlatStrings
from train_clip.errors import MissingFile, UserError, first_line
from train_clip.files import MAX_CAPTIONS, replacing
from train_clip.optional import optional
from train_clip.probes.rows import PARQUET, parquet_to, require_format

WHAT = "a file of embeddings"
VERSION = 1  # of the format, in ``about``
TEXTS = ("key", "path", "caption")  # columns beside the embedding
BLOCK = 8192  # rows read at a time
MOST_BYTES = 2**25  # of a block of text
LONGEST = MAX_CAPTIONS * 4  # bytes of a text, in NumPy's UTF-32
METADATA = b"train_clip"  # of a Parquet file's schema: ``about`` as JSON
DTYPES = ("float32", "float16")
DAMAGED = OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error, csv.Error
KINDS: dict[str, Any] = {"version": int, "fingerprint": str, "dim": int, "dtype": str, "number": int, "kind": str}

About = dict[str, Any]
Write = Callable[[np.ndarray, tuple[Sequence[str], ...]], None]
Append = Callable[[np.ndarray, Sequence[str], Sequence[str], Sequence[str]], None]


@dataclass(frozen=True)
class Vectors:
    """A file of embeddings; blocks and columns are read from it at each call.

    ``about`` holds: ``version``; the ``model``'s name, its ``fingerprint``, and the ``checkpoint`` and ``weights`` that
    load it again, ``load(checkpoint, **weights)``; ``dim``, ``dtype``, ``normalized``; ``kind``, "image" or "caption",
    of which a row is; the ``source`` and the ``root`` that paths are relative to, both absolute; the ``number`` of
    rows; the ``device`` it was made on, and a digest of the ``content``.
    """

    path: Path
    about: About
    read_blocks: Callable[[int], Iterator[np.ndarray]]
    read_texts: Callable[[str], Iterable[str]]

    def __len__(self) -> int:
        return int(self.about["number"])

    def blocks(self, rows: int = BLOCK) -> Iterator[np.ndarray]:
        """Read all embeddings in their order: (n, D) float32, n at most ``rows``."""
        number = 0
        with reading(self.path):
            for block in self.read_blocks(rows):
                number += len(block)
                if block.dtype != self.about["dtype"] or block.shape[1:] != (self.about["dim"],):
                    raise ValueError(f"embeddings {block.shape[1:]} {block.dtype}")
                yield np.asarray(block, np.float32)
            if number != len(self):
                raise ValueError(f"{number:,} of {len(self):,} embeddings")

    @property
    def keys(self) -> Sequence[str]:
        """The name of each row's pair: its image's, the same on all systems; equal for captions of one image."""
        return self._texts("key")

    @property
    def paths(self) -> Sequence[str]:
        """The image of each row, relative to ``about["root"]``; what cannot be printed is escaped."""
        return self._texts("path")

    @property
    def captions(self) -> Sequence[str]:
        """The caption of each row: the image's first, or the one that was embedded; empty where there is none."""
        return self._texts("caption")

    def _texts(self, name: str) -> Sequence[str]:
        with reading(self.path):
            found = FlatStrings(self.read_texts(name))
            if len(found) != len(self):
                raise ValueError(f"{len(found):,} of {len(self):,} in the column {name!r}")
        return found


def open_vectors(path: str | Path) -> Vectors:
    """Open a file of embeddings: only what describes it is read.

    Raises:
        UserError: no such file, another kind of file, or a damaged one; the last also where its content is read.
    """
    path = Path(path)
    require_format(path, FORMATS, WHAT)
    if not path.is_file():
        raise MissingFile(f"{path}: there is no such file. Expected embeddings that `train-clip embed` wrote.")
    with reading(path):
        about, *readers = FORMATS[path.suffix][0](path)
        for name, kind in KINDS.items():
            if not isinstance(about.get(name), kind):
                raise ValueError(f"{name} is {about.get(name)!r}")
        if about["version"] > VERSION or about["dtype"] not in DTYPES or min(about["dim"], about["number"] + 1) < 1:
            raise ValueError(f"version {about['version']}, {about['number']} × {about['dim']} {about['dtype']}")
    return Vectors(path, about, *readers)


@contextmanager
def writer(path: Path, about: About) -> Iterator[Append]:
    """Write a file of embeddings by ``append(embeddings, keys, paths, captions)``, a block each; complete or absent.

    ``about`` says beforehand how many rows there will be, and of which type and width.
    """
    number = 0
    with FORMATS[path.suffix][1](path, about) as write:

        def append(embeddings: np.ndarray, *texts: Sequence[str]) -> None:
            nonlocal number
            number += len(embeddings)
            if embeddings.shape[1] != about["dim"] or [len(embeddings)] * len(TEXTS) != list(map(len, texts)):
                raise ValueError(f"{path}: a block of {embeddings.shape}, with {list(map(len, texts))} texts.")
            write(np.ascontiguousarray(embeddings, about["dtype"]), texts)

        yield append
        if number != about["number"]:
            raise ValueError(f"{path}: {number:,} rows were written, expected {about['number']:,}.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a ``UserError`` that names a file where what is read within shows that it is damaged."""
    try:
        yield
    except DAMAGED as error:
        raise UserError(
            f"{path}: no embeddings of this version of train-clip, or damaged ({first_line(error)}). Expected a file "
            "that `train-clip embed` wrote, and those beside it; remove it, and write it again."
        ) from error


def files_of(path: Path) -> list[Path]:
    """The files of an output: beside ``X.npy`` there are ``X.csv`` and ``X.json``."""
    return [path, path.with_suffix(".csv"), path.with_suffix(".json")] if path.suffix == ".npy" else [path]


def _read_parquet(path: Path) -> tuple[Any, ...]:
    parquet = optional("pyarrow.parquet", *PARQUET)
    with parquet.ParquetFile(path) as file:
        about = json.loads(file.schema_arrow.metadata[METADATA])

    def columns(name: str, rows: int) -> Iterator[Any]:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):  # all at once, pyarrow keeps what it has read
                for batch in file.read_row_group(group, [name]).to_batches(rows):
                    yield batch.column(0)

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for column in columns("embedding", rows):
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)

    return about, blocks, lambda name: chain.from_iterable(some.to_pylist() for some in columns(name, BLOCK))


@contextmanager
def _write_parquet(path: Path, about: About) -> Iterator[Write]:
    arrow = optional("pyarrow", *PARQUET)
    numbers = arrow.list_(arrow.from_numpy_dtype(about["dtype"]), about["dim"])
    fields = [*((name, arrow.string()) for name in TEXTS), ("embedding", numbers)]
    # Embeddings are noise to a compressor.
    how: Any = {"compression": dict.fromkeys(TEXTS, "zstd"), "use_dictionary": False}
    with parquet_to(path, fields, {METADATA: json.dumps(about)}, **how) as append:

        def write(embeddings: np.ndarray, texts: tuple[Sequence[str], ...]) -> None:
            rows = arrow.FixedSizeListArray.from_arrays(arrow.array(embeddings.reshape(-1)), about["dim"])
            append([*map(list, texts), rows])

        yield write


def _read_npz(path: Path) -> tuple[Any, ...]:
    def blocks(name: str, rows: int, *width: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            yield from _array_blocks(member, rows, *width)

    def texts(name: str) -> Iterator[str]:
        return (str(text) for block in blocks(name, BLOCK) for text in block)

    about = json.loads(next(texts("about")))
    return about, lambda rows: blocks("embeddings", rows, about["dim"]), texts


@contextmanager
def _write_npz(path: Path, about: About) -> Iterator[Write]:
    """As ``numpy.savez`` does; a fixed date gives the same content the same bytes."""
    columns: list[list[FlatStrings]] = [[] for _ in TEXTS]

    def write(embeddings: np.ndarray, texts: tuple[Sequence[str], ...]) -> None:
        matrix.write(embeddings)
        for column, some in zip(columns, texts, strict=True):
            column.append(FlatStrings(some))

    def member(name: str, length: int, dtype: np.dtype, *width: int) -> Any:
        info = zipfile.ZipInfo(f"{name}.npy")
        # Columns of text are mostly padding, and embeddings noise.
        info.compress_type = zipfile.ZIP_STORED if width else zipfile.ZIP_DEFLATED
        file = archive.open(info, "w", force_zip64=True)
        _write_header(file, dtype, length, *width)
        return file

    with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with member("embeddings", about["number"], np.dtype(about["dtype"]), about["dim"]) as matrix:
            yield write
        named: list[tuple[str, list[Any]]] = [*zip(TEXTS, columns, strict=True), ("about", [[json.dumps(about)]])]
        for name, blocks in named:
            dtype, texts = np.dtype(f"<U{max(map(len, chain([' '], *blocks)))}"), chain.from_iterable(blocks)
            with member(name, sum(map(len, blocks)), dtype) as file:
                while block := list(islice(texts, max(1, MOST_BYTES // dtype.itemsize))):
                    file.write(np.array(block, dtype))


def _read_npy(path: Path) -> tuple[Any, ...]:
    _, table, told = files_of(path)
    about = json.loads(told.read_text(encoding="utf-8"))

    def blocks(rows: int) -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            yield from _array_blocks(file, rows, about["dim"])

    def texts(name: str) -> Iterator[str]:
        limit = csv.field_size_limit(MAX_CAPTIONS)  # csv knows one for the whole process
        try:
            with table.open(encoding="utf-8", newline="") as file:
                yield from (row[name] for row in csv.DictReader(file))
        finally:
            csv.field_size_limit(limit)

    return about, blocks, texts


@contextmanager
def _write_npy(path: Path, about: About) -> Iterator[Write]:
    one, two, three = map(replacing, files_of(path))
    # The matrix, which is opened first, is the last to be there under its name.
    with one as matrix, two as table, three as told:
        told.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        with matrix.open("wb") as file, table.open("w", encoding="utf-8", newline="") as lines:
            _write_header(file, np.dtype(about["dtype"]), about["number"], about["dim"])
            rows = csv.writer(lines, lineterminator="\n")
            rows.writerow(TEXTS)

            def write(embeddings: np.ndarray, texts: tuple[Sequence[str], ...]) -> None:
                file.write(embeddings)
                rows.writerows(zip(*texts, strict=True))

            yield write


def _write_header(file: Any, dtype: np.dtype, *shape: int) -> None:
    told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, told)


def _array_blocks(file: Any, rows: int, *width: int) -> Iterator[np.ndarray]:
    """Read an array in NumPy's format, of floats or of text, by rows of the expected width."""
    np.lib.format.read_magic(file)
    (length, *found), is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    size = dtype.itemsize * math.prod(width)
    if is_fortran or dtype.kind != ("f" if width else "U") or [*width] != found or size > LONGEST:
        raise ValueError(f"an array of {found} {dtype}")
    rows = rows if width else max(1, min(rows, MOST_BYTES // size))
    for first in range(0, length, rows):
        number = min(rows, length - first)
        yield np.frombuffer(file.read(number * size), dtype).reshape(number, *width)


# By ending: ``read(path)`` gives ``about``, what reads blocks, and what reads texts; ``with write(path, about)`` gives
# what writes a block.
FORMATS: dict[str, tuple[Any, Any]] = {
    ".parquet": (_read_parquet, _write_parquet),
    ".npz": (_read_npz, _write_npz),
    ".npy": (_read_npy, _write_npy),
}
