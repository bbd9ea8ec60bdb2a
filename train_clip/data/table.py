"""A table of images and captions → pairs.

A row is one image and one caption; further rows of the same image are its other captions. CSV and TSV are quoted as
spreadsheets and pandas do it; a line of JSON is an object, whose caption may be a list.
"""

import contextlib
import csv
import json
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from train_clip.data.pairs import IN_TABLE, MAX_BYTES, PairList, is_blank, plain_name
from train_clip.data.scan import DEFAULTS, GONE, READABLE, Scan, fault_of
from train_clip.errors import MissingFile, UserError
from train_clip.options import SourceOptions


def scan_table(table: Path, options: SourceOptions = DEFAULTS) -> Scan:
    """Read a table's rows, in UTF-8 with or without a byte order mark, and look whether its images are there.

    Faults are rows that are not whole, and images that are no regular file or may not be read.

    Raises:
        UserError: no such table, not of these kinds, not UTF-8, or without the columns.
    """
    root = os.path.join(table.parent, "")  # noqa: PTH118, with its separator at the end
    scan = Scan(table, 0, PairList(root), [], [])
    there: dict[str, list[str]] = defaultdict(list)
    for name, texts in _captions(scan, options).items():
        spelling = next((one for one in _spellings(root, name) if os.path.lexists(posixpath.join(root, one))), name)
        path = posixpath.join(root, spelling)
        fault = fault_of(path)
        if fault == GONE:
            scan.lone_captions.append(name)
        elif fault:
            scan.faults.append(f"{path}: {fault}; {READABLE}. Fix or remove its rows.")
        else:
            there[spelling] += texts
    scan.lone_captions.sort()
    names = sorted(there, key=plain_name)
    scan.lone_images += [name for name in names if not there[name]]
    paired = [name for name in names if there[name]]
    scan.pairs = PairList(root, paired, (IN_TABLE + "\n".join(there[name]) for name in paired))
    return scan


def _captions(scan: Scan, options: SourceOptions) -> dict[str, list[str]]:
    """The captions of each image, by its name as the table has it."""
    table = scan.source
    suffix = table.suffix.lower()
    names = options.image_column, options.caption_column
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        if suffix not in READERS or not table.is_file():
            kind = UserError if table.exists() else MissingFile
            raise kind(f"{table}: cannot be read as a table. Expected one of {', '.join(READERS)}.")
        with table.open(encoding="utf-8-sig", newline="") as file:
            for line, row in READERS[suffix](table, file, names):
                scan.num_entries += 1
                image, texts = map(row.get, names)
                texts = texts if isinstance(texts, list) else [texts]
                if not all(map(_is_text, (image, *texts))) or not image.strip():
                    scan.faults.append(
                        f"{table}, line {line}: an incomplete row; expected {names[0]!r} to name an image and "
                        f"{names[1]!r} to be text. Fix or remove it."
                    )
                    continue
                lines = (text.replace("\r\n", " ").replace("\n", " ").strip() for text in texts)
                captions[str(PurePosixPath(image))] += [text for text in lines if not is_blank(text)]
    except PermissionError:
        raise UserError(f"{table}: no permission to read this table. Allow it (chmod +r; chmod +x a folder).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: is not UTF-8 ({error.reason}). Save it as UTF-8.") from None
    return captions


# The number of a line, and a mapping from columns to what it holds; an empty one where it is not whole.
Row = tuple[int, Any]


def _separated(table: Path, file: TextIO, names: tuple[str, str]) -> Iterator[Row]:
    reader = csv.reader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",", strict=True)
    limit = csv.field_size_limit(MAX_BYTES)  # csv knows one for the whole process
    try:
        header = next(reader, [])
        _require_columns(table, header, names)
        for row in filter(any, reader):
            yield reader.line_num, dict(zip(header, row, strict=True)) if len(row) == len(header) else {}
    except csv.Error as error:
        raise UserError(
            f"{table}, line {reader.line_num}: {error}. Expected quotes around text that contains quotes, separators "
            'or line breaks, and quotes inside it doubled: "a ""red"" ball".'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _json_lines(table: Path, file: TextIO, names: tuple[str, str]) -> Iterator[Row]:
    columns_known = False
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {line}: is not JSON ({error}). Expected one object per line.") from None
        if isinstance(row, dict) and not columns_known:
            _require_columns(table, list(row), names)
            columns_known = True
        yield line, row if isinstance(row, dict) else {}


READERS = {".csv": _separated, ".tsv": _separated, ".jsonl": _json_lines}


def _require_columns(table: Path, header: list[str], names: tuple[str, str]) -> None:
    for name in names:
        if header.count(name) != 1:
            raise UserError(
                f"{table}: its columns are {', '.join(map(repr, header)) or 'nothing'}; expected one {name!r}. Name "
                "the columns with --image_column and --caption_column; the first line of a table holds the column "
                "names."
            )


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(items)) < len(items):
        # JSON itself would take the last of them.
        raise ValueError("a key occurs twice")
    return row


def _is_text(value: Any) -> bool:
    # Text that UTF-8 can hold: JSON can spell half of a character.
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _spellings(root: str, name: str) -> Iterator[str]:
    """What a file may be called: by way of another folder, blanks around, accents apart."""
    direct = posixpath.normpath(name)
    if direct != name:
        with contextlib.suppress(OSError):
            # Not so where a link is on the way: "link/.." is not this folder.
            if os.path.samefile(posixpath.join(root, direct), posixpath.join(root, name)):  # noqa: PTH121
                yield direct
    yield from (name, name.strip(), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
