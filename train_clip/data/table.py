"""A table of images and captions → pairs, and back.

A row is one image and one caption; further rows of the same image are its other captions. CSV and TSV are quoted as
spreadsheets and pandas do it; a line of JSON is an object, whose caption may be a list.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import posixpath
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from train_clip.data.pairs import MAX_BYTES, PairList, is_blank, plain_name
from train_clip.data.scan import Scan, may_read
from train_clip.errors import UserError
from train_clip.files import replacing


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns.

    Args:
        image: paths, relative to the table's folder.
        caption: captions.
    """

    image: str = "image"
    caption: str = "caption"


def scan_table(table: Path, columns: Columns) -> Scan:
    """Read a table's rows and look whether its images are there.

    Args:
        table: ``.csv``, ``.tsv`` or ``.jsonl``, UTF-8 with or without a byte order mark.
        columns: which of its columns hold what.

    Returns:
        What was found. Its faults are rows that are not whole, and images that are no regular file or may not be read.

    Raises:
        UserError: no such table, not of these kinds, not UTF-8, or without the columns.
    """
    captions, num_rows, faults = _read(table, columns)
    root = os.path.join(table.parent, "")  # noqa: PTH118, with its separator at the end
    there: dict[str, str] = {}
    gone: list[str] = []
    for name in captions:
        spelling = next((one for one in _spellings(root, name) if os.path.lexists(posixpath.join(root, one))), name)
        try:
            fault = _fault(posixpath.join(root, spelling))
        except (FileNotFoundError, NotADirectoryError):
            gone.append(name)
            continue
        if fault:
            faults.append(f"{posixpath.join(root, spelling)}: {fault}")
        else:
            there[spelling] = "\n".join(filter(None, (there.get(spelling), captions[name])))
    there = dict(sorted(there.items(), key=lambda item: plain_name(item[0])))
    paired = [name for name, texts in there.items() if texts]
    pairs = PairList(root, paired, (there[name] for name in paired), in_table=True)
    return Scan(table, num_rows, pairs, [name for name, texts in there.items() if not texts], sorted(gone), faults)


def write_table(table: Path, rows: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Write a CSV table of pairs, whole or not at all.

    Args:
        table: to be written; its folder is made.
        rows: path of an image, and its captions.

    Raises:
        UserError: a name that is not UTF-8.
    """
    here = os.path.realpath(table.parent)
    with replacing(table) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        # Lines end in CR LF, as RFC 4180 has it: only then is a name or caption that holds either put in quotes.
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for image, texts in rows:
            # Through links: ".." leads to the folder above the one that is linked to.
            place, name = os.path.split(image)
            name = Path(os.path.relpath(os.path.join(os.path.realpath(place), name), here)).as_posix()  # noqa: PTH118
            try:
                writer.writerows([name, text] for text in texts)
            except UnicodeEncodeError:
                raise UserError(f"{image!a}: its name is not UTF-8, so no table can hold it. Rename it.") from None


def _read(table: Path, columns: Columns) -> tuple[dict[str, str], int, list[str]]:
    """The captions of each image, a line each; the number of rows; and those that are not whole."""
    try:
        exists = table.is_file()
    except PermissionError:
        raise UserError(f"{table}: no permission to look into its folder. Give it (chmod +x).") from None
    if not exists:
        raise UserError(f"{table}: there is no such table. Expected a file of {', '.join(READERS)}.")
    if table.suffix.lower() not in READERS:
        raise UserError(f"{table}: is of a kind that is not known. Expected a file of {', '.join(READERS)}.")
    captions: dict[str, str] = {}
    faults: list[str] = []
    num_rows = 0
    for line, image, texts in _rows(table, columns):
        num_rows += 1
        if not image.strip():
            faults.append(f"{table}, line {line}: {_WRONG_ROW.format(columns)}")
            continue
        name = "/".join(part for at, part in enumerate(image.split("/")) if (part or not at) and part != ".") or "."
        lines = [text for text in map(_one_line, texts) if not is_blank(text)]
        captions[name] = "\n".join([captions[name], *lines] if captions.get(name) else lines)
    return captions, num_rows, faults


csv.field_size_limit(MAX_BYTES)  # as much as a caption file may hold; for the process, which is csv's only way

_WRONG_ROW = "an incomplete row; expected {0.image!r} to name an image and {0.caption!r} to be text. Mend or remove it."


def _rows(table: Path, columns: Columns) -> Iterator[tuple[int, str, list[str]]]:
    """Number of the line, image and captions of each row; no image where the row is not whole."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            yield from READERS[table.suffix.lower()](table, file, columns)
    except PermissionError:
        raise UserError(f"{table}: no permission to read this table. Give it (chmod +r).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: is not UTF-8 ({error.reason}). Save it as UTF-8.") from None


def _separated(delimiter: str) -> Callable[[Path, TextIO, Columns], Iterator[tuple[int, str, list[str]]]]:
    def rows(table: Path, file: TextIO, columns: Columns) -> Iterator[tuple[int, str, list[str]]]:
        """Rows as ``_rows`` gives them."""
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            image, caption = (_place(table, header, column) for column in (columns.image, columns.caption))
            for row in reader:
                if any(row):
                    whole = len(row) == len(header)
                    yield reader.line_num, row[image] if whole else "", [row[caption]] if whole else []
        except csv.Error as error:
            raise UserError(
                f"{table}, line {reader.line_num}: {error}. Expected text with quotes, separators or line breaks in it "
                'to stand in quotes, and its own quotes to be doubled: "a ""red"" ball".'
            ) from None

    return rows


def _json_lines(table: Path, file: TextIO, columns: Columns) -> Iterator[tuple[int, str, list[str]]]:
    known = False
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {line}: is not JSON ({error}). Expected one object a line.") from None
        if not known and isinstance(row, dict):
            for column in (columns.image, columns.caption):
                _place(table, list(row), column)
            known = True
        image, captions = (row.get(columns.image), row.get(columns.caption)) if isinstance(row, dict) else (None, None)
        texts: list[Any] = captions if isinstance(captions, list) else [captions]
        whole = all(map(_is_text, (image, *texts)))
        yield line, str(image) if whole else "", texts if whole else []


READERS = {".csv": _separated(","), ".tsv": _separated("\t"), ".jsonl": _json_lines}


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once; JSON itself would take the last of them."""
    row = dict(items)
    if len(row) < len(items):
        raise ValueError("a key is there twice")
    return row


def _is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold: JSON can spell half of a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _spellings(root: str, name: str) -> Iterator[str]:
    """How a file may be called that a table calls so: by way of another folder, blanks around, accents apart."""
    direct = posixpath.normpath(name)
    if direct != name:
        with contextlib.suppress(OSError):
            # Not so where a link is on the way: "link/.." is not this folder.
            if os.path.samefile(posixpath.join(root, direct), posixpath.join(root, name)):  # noqa: PTH121
                yield direct
    yield name
    yield name.strip()
    if not name.isascii():
        yield unicodedata.normalize("NFC", name)
        yield unicodedata.normalize("NFD", name)


def _place(table: Path, header: list[str], column: str) -> int:
    if header.count(column) == 1:
        return header.index(column)
    found = ", ".join(map(repr, header)) or "nothing"
    raise UserError(
        f"{table}: its columns are {found}; expected one {column!r}. Name the columns by --image_column and "
        "--caption_column; a table begins with their names."
    )


def _one_line(text: str) -> str:
    return text.replace("\r\n", " ").replace("\n", " ").strip()


def _fault(path: str) -> str | None:
    """What is wrong with an image; a pipe would block its reader for ever."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116, a quarter of the time
    except (FileNotFoundError, NotADirectoryError):
        raise
    except PermissionError:
        return "no permission to look for it. Give it (chmod +x), or remove its rows."
    except (OSError, ValueError) as error:
        return f"cannot be looked up ({error}). Mend or remove its rows."
    if not stat.S_ISREG(mode):
        return "is no regular file; expected an image. Mend or remove its rows."
    if not may_read(path):
        return "no permission to read this file. Give it (chmod +r), or remove its rows."
    return None
