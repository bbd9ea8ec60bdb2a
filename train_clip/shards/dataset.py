"""``--dataset``: a data set of Hugging Face, or Parquet files with images in them, by the ``datasets`` library.

It keeps all rows in Arrow files that are mapped into memory, so that any row is read without those before it.
"""

import io
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from train_clip.data.pairs import IN_TABLE, PairList
from train_clip.data.scan import Scan
from train_clip.data.tokenizer import is_empty
from train_clip.errors import BadSample, UserError, first_line
from train_clip.files import IN_ROWS, MAX_CAPTIONS, opened
from train_clip.optional import optional
from train_clip.options import SourceOptions

ROWS_AT_ONCE = 1000  # whose captions are read


def scan_dataset(source: Path, options: SourceOptions) -> Scan:
    """Pair the image and the captions of each row; a row without captions counts as an image without one.

    Raises:
        UserError: no such data set, or not of these columns.
    """
    spec = str(options.dataset)
    rows = rows_of(spec)
    for name, option in ((options.image_column, "--image_column"), (options.caption_column, "--caption_column")):
        if name not in rows.column_names:
            raise UserError(f"{spec}: its columns are {', '.join(rows.column_names)}; expected {name!r} ({option}).")
    scan = Scan(source, len(rows), PairList(""), [], [], pair_by="dataset")
    names, texts = list[str](), list[str]()
    for row, cell in enumerate(_cells(rows, options.caption_column)):
        several = [one for one in (cell if isinstance(cell, list) else [cell]) if one is not None]
        name = f"{IN_ROWS[1:]}{options.image_column}-{row:09}"
        odd = [one for one in several if not isinstance(one, str) or len(one.encode("utf-8", "replace")) > MAX_CAPTIONS]
        if odd:
            scan.faults.append(
                f"{spec}, row {row:,}: its {options.caption_column!r} holds {type(odd[0]).__name__}; expected text of "
                f"at most {MAX_CAPTIONS:,} bytes, or a list of such. Name another column (--caption_column)."
            )
            continue
        lines = [line for text in several if not is_empty(line := " ".join(text.split("\n")).strip())]
        if lines:
            names.append(name)
            texts.append(IN_TABLE + "\n".join(lines))
        else:
            scan.lone_images.append(name)
    scan.pairs = PairList(os.path.join(spec, ""), names, texts)  # noqa: PTH118
    return scan


def open_row(path: str) -> io.BufferedReader:
    """Open the image in a row, SPEC/#COLUMN-ROW; a ``BadSample`` where there is none."""
    spec, _, place = path.rpartition(IN_ROWS)
    column, _, row = place.rpartition("-")
    cell = _images(spec, column)[int(row)][column]
    content, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if content is None and name:
        return opened(name)
    if not isinstance(content, bytes):
        raise BadSample(path, f"row without an image ({type(content).__name__})")
    return io.BufferedReader(io.BytesIO(content))


@lru_cache(4)
def rows_of(spec: str) -> Any:
    """Open NAME, a folder or Parquet files, with :SPLIT; the rows of the one split, or of ``train``."""
    datasets = optional("datasets", "--dataset")
    name, _, split = spec.rpartition(":") if ":" in spec else (spec, "", "")
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        elif name.endswith(".parquet") or list(Path(name).glob("*.parquet")):
            files = name if name.endswith(".parquet") else f"{name}/*.parquet"
            found = datasets.load_dataset("parquet", data_files=files)
        else:
            found = datasets.load_dataset(name)
    except Exception as error:  # of any library below
        raise UserError(f"--dataset {name}: cannot be opened ({type(error).__name__}: {first_line(error)}).") from error
    if not isinstance(found, dict):
        return found
    wanted = split or (next(iter(found)) if len(found) == 1 else "train")
    if wanted not in found:
        raise UserError(f"--dataset {spec}: has the splits {', '.join(found)}. Expected one of them: {name}:SPLIT.")
    return found[wanted]


@lru_cache(4)
def _images(spec: str, column: str) -> Any:
    """The rows, with the bytes of each image in place of its pixels."""
    rows, datasets = rows_of(spec).select_columns([column]), optional("datasets", "--dataset")
    is_image = isinstance(rows.features[column], datasets.Image)
    return rows.cast_column(column, datasets.Image(decode=False)) if is_image else rows


def _cells(rows: Any, column: str) -> Iterator[Any]:
    for batch in rows.select_columns([column]).iter(ROWS_AT_ONCE):
        yield from batch[column]
