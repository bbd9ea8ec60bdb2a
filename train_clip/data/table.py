"""A table of images and captions → pairs.

A row is one image and one caption; further rows of the same image are its other captions. CSV and TSV are quoted as
spreadsheets and pandas do it; a line of JSON is an object, whose caption may be a list.
"""

import contextlib
import csv
import json
import os
import posixpath
import reprlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from train_clip.data.pairs import IN_TABLE, PairList, plain_name
from train_clip.data.scan import DEFAULTS, GONE, READABLE, Scan, advice_on, fault_of, path_advice
from train_clip.data.tokenizer import is_empty
from train_clip.errors import MissingFile, UserError
from train_clip.files import MAX_CAPTIONS, MAX_PATH, MAX_ROW, regular
from train_clip.options import SourceOptions
from train_clip.printing import printable

NAMED = 20  # columns in a message
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
BAD_QUOTES = {  # what csv says, and what it means
    "unexpected end of data": "a quote that opens in this row is never closed",
    "expected after": "text follows the quote that closes a cell",
    "field larger than": f"a cell has over {MAX_CAPTIONS:,} characters, as where a quote is not closed",
    "row larger than": f"a row has over {MAX_ROW:,} characters, as where a quote is not closed",
}


class Columns(NamedTuple):
    """The columns that are read."""

    images: str
    texts: str
    option: str  # that names the column of texts; of any but captions, JSON's numbers and truth values are texts too


CAPTIONS = "--caption_column"


def scan_table(table: Path, options: SourceOptions = DEFAULTS, option: str = CAPTIONS) -> Scan:
    """Read a table's rows, in UTF-8 with or without a byte order mark, and look whether its images are there.

    The column of captions is named by ``option``, which may be another one's.
    Faults are rows that are not whole, and images that are no regular file or may not be read.

    Raises:
        UserError: no such table, not of these kinds, not UTF-8, or without the columns.
    """
    root = os.path.join(table.parent, "")  # noqa: PTH118, with its separator at the end
    scan = Scan(table, 0, PairList(root), [], [])
    there: dict[str, list[str]] = defaultdict(list)
    for name, texts in _captions(scan, Columns(options.image_column, options.caption_column, option)).items():
        spelling = next((one for one in _spellings(root, name) if os.path.lexists(posixpath.join(root, one))), name)
        path = posixpath.join(root, spelling)
        fault = fault_of(path)
        if fault == GONE:
            scan.lone_captions.append(name)
        elif fault:
            scan.faults.append(f"{printable(path)}: {fault}; {READABLE}. Fix or remove its rows.")
        else:
            there[spelling] += texts
    scan.lone_captions.sort()
    names = sorted(there, key=plain_name)
    scan.lone_images += [name for name in names if not there[name]]
    paired = [name for name in names if there[name]]
    scan.pairs = PairList(root, paired, (IN_TABLE + "\n".join(there[name]) for name in paired))
    return scan


def _captions(scan: Scan, names: Columns) -> dict[str, list[str]]:
    """The captions of each image, by its name as the table has it."""
    table = scan.source
    suffix = table.suffix.lower()
    captions: dict[str, list[str]] = defaultdict(list)
    fault = fault_of(os.fspath(table))
    if fault or suffix not in READERS:
        raise (MissingFile if fault == GONE else UserError)(
            f"{table}: {fault or 'is no table that is read here'}. Expected a table ({', '.join(READERS)}); for a "
            f"folder of images and captions use --folder.{path_advice(str(table)) if fault else advice_on([suffix])}"
        )
    try:
        with open(table, encoding="utf-8-sig", newline="", opener=regular) as file:
            lines = iter(partial(file.readline, MAX_ROW + 1), "")
            for line, row in READERS[suffix](table, lines, names):
                scan.num_entries += 1
                if names.option != CAPTIONS and isinstance(row, dict) and names.texts != names.images:
                    cells = _texts(row.get(names.texts))
                    row[names.texts] = [str(one) if isinstance(one, int) else one for one in cells]
                if fault := row if isinstance(row, str) else _fault(row, names):
                    scan.faults.append(f"{table}, line {line}: {fault}. Fix or remove this row.")
                    continue
                image, texts = row[names.images], _texts(row.get(names.texts))
                name = image if "://" in image else str(PurePosixPath(image))  # an address is shown as it is
                texts = [text.replace("\r\n", " ").replace("\n", " ").strip() for text in texts]
                captions[name] += [text for text in texts if not is_empty(text)]
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: is not UTF-8 ({error.reason}). Save it as UTF-8.") from None
    return captions


def _texts(cell: Any) -> list[Any]:
    """A cell's captions; what stands for none in JSON (null, NaN, no such key) is none."""
    return [text for text in (cell if isinstance(cell, list) else [cell]) if text is not None and text == text]


def _fault(row: Any, names: Columns) -> str:
    """What is wrong with a row, in words; empty where nothing is."""
    image, captions = row.get(names.images), _texts(row.get(names.texts))
    if not _texts(image) or (isinstance(image, str) and not image.strip()):
        return f"{names.images!r} is empty; expected the path of an image"
    cells = [(names.images, image, MAX_PATH, "the path of an image")]
    for name, cell, most, expected in cells + [(names.texts, text, MAX_CAPTIONS, "text") for text in captions]:
        content = cell.encode("utf-8", "replace") if isinstance(cell, str) else b""
        # Half of a character, which JSON can spell, is no text.
        if content.decode() != cell:
            return f"{name!r} is {reprlib.repr(cell)}; expected {expected}"
        if len(content) > most:
            return f"{name!r} has {len(content):,} bytes; expected {expected} of at most {most:,}"
    return ""


# The number of a row's first line, and a mapping from columns to what it holds, or what is wrong with the row.
Row = tuple[int, Any]


def _separated(table: Path, lines: Iterator[str], names: Columns) -> Iterator[Row]:
    separator = "\t" if table.suffix.lower() == ".tsv" else ","
    first = next(lines, "")
    likely = max((separator, *SEPARATORS), key=first.count)
    size, line = 0, 1

    def of_a_row() -> Iterator[str]:
        nonlocal size
        for line in chain([first], lines):
            if (size := size + len(line)) > MAX_ROW:
                raise csv.Error("row larger than")
            yield line

    reader = csv.reader(of_a_row(), delimiter=separator, strict=True)
    limit = csv.field_size_limit(MAX_CAPTIONS)  # csv knows one for the whole process
    try:
        if likely != separator and not set(names[:2]) <= set(next(csv.reader([first], delimiter=separator))):
            raise UserError(
                f"{table}: its columns seem to be separated by {SEPARATORS[likely]}; expected {SEPARATORS[separator]} "
                f"in a {table.suffix} file. Save it with commas as .csv, or with tabs as .tsv."
            )
        header = next(reader, [])
        _require_columns(table, header, names)
        size, line = 0, reader.line_num + 1
        for row in reader:
            if any(row) and len(row) == len(header):
                yield line, dict(zip(header, row, strict=True))
            elif any(row):
                found = f"has {len(row)} cell{'s' * (len(row) > 1)}; expected {len(header)}"
                yield line, f"{found}, with quotes around text that contains {SEPARATORS[separator]}"
            size, line = 0, reader.line_num + 1
    except csv.Error as error:
        found = next((words for said, words in BAD_QUOTES.items() if said in str(error)), str(error))
        raise UserError(
            f"{table}, line {line}: {found}. Expected quotes around text that contains quotes, separators "
            'or line breaks, and quotes inside it doubled: "a ""red"" ball".'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _json_lines(table: Path, lines: Iterator[str], names: Columns) -> Iterator[Row]:
    keys: list[str] = []
    has_captions = False
    for line, text in enumerate(lines, 1):
        if len(text) > MAX_ROW:
            raise UserError(f"{table}, line {line}: is over {MAX_ROW:,} characters. Expected one object per line.")
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {line}: is not JSON ({error}). Expected one object per line.") from None
        if isinstance(row, dict):
            if not keys:
                keys = list(row)
                _require_columns(table, keys, names, 1)
            has_captions = has_captions or names.texts in row
        yield line, row if isinstance(row, dict) else f"is {reprlib.repr(row)}; expected an object"
    if keys and not has_captions:
        _require_columns(table, keys, names)


READERS = {".csv": _separated, ".tsv": _separated, ".jsonl": _json_lines}


def _require_columns(table: Path, header: list[str], names: Columns, number: int = 2) -> None:
    found = ", ".join(map(reprlib.repr, header[:NAMED])) or "nothing"
    for name in names[:number]:
        if header.count(name) != 1:
            raise UserError(
                f"{table}: its columns are {found}; expected one {name!r}. Name the columns with --image_column and "
                f"{names.option}; the first line of a table holds the column names."
            )


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(items)) < len(items):
        # JSON itself would take the last of them.
        raise ValueError("a key occurs twice")
    return row


def _spellings(root: str, name: str) -> Iterator[str]:
    """What a file may be called: by way of another folder, blanks around, accents apart."""
    direct = posixpath.normpath(name)
    if direct != name:
        with contextlib.suppress(OSError):
            # Not so where a link is on the way: "link/.." is not this folder.
            if os.path.samefile(posixpath.join(root, direct), posixpath.join(root, name)):  # noqa: PTH121
                yield direct
    yield from (name, name.strip(), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
