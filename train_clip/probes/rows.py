"""Rows of columns → Parquet, or a table as CSV: complete or absent, a few in memory at a time."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_clip.errors import UsageError
from train_clip.files import replacing
from train_clip.optional import optional
from train_clip.printing import no_formula

GROUP = 2**10  # rows that are read together, in Parquet: more of them are more memory
PARQUET = "Parquet", "use another format"
FORMATS = (".csv", ".parquet")

Row = dict[str, Any]


def require_format(path: Path, formats: Iterable[str], what: str) -> None:
    """Refuse a name that does not say how to write or read, or a library that is missing, before the work."""
    if path.suffix not in formats:
        raise UsageError(f"{path}: {what} ends in {', '.join(formats)}. Give it one of these endings.")
    if path.suffix == ".parquet":
        optional("pyarrow.parquet", *PARQUET)


@contextmanager
def rows_to(path: Path, columns: dict[str, type]) -> Iterator[Callable[[list[Row]], object]]:
    """Write rows to a file: what this yields takes some at a time."""
    if path.suffix == ".parquet":
        arrow = optional("pyarrow", *PARQUET)
        kinds = {str: arrow.string(), float: arrow.float64()}
        with parquet_to(path, [(name, kinds[kind]) for name, kind in columns.items()]) as append:
            yield lambda rows: append([[row[name] for row in rows] for name in columns])
        return
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        yield lambda rows: table.writerows([[_cell(name, row[name]) for name in columns] for row in rows])


@contextmanager
def parquet_to(path: Path, fields: list[Any], metadata: Any = None, **how: Any) -> Iterator[Callable[[Any], None]]:
    """Write blocks of columns to a Parquet file of these fields: what this yields takes a block at a time."""
    arrow, parquet = optional("pyarrow", *PARQUET), optional("pyarrow.parquet", *PARQUET)
    schema, held = arrow.schema(fields, metadata), list[Any]()
    with replacing(path) as beside, parquet.ParquetWriter(beside, schema, **how) as file:

        def append(columns: Any) -> None:
            held.append(arrow.RecordBatch.from_arrays(columns, schema=schema))
            if sum(map(len, held)) >= GROUP:
                file.write_table(arrow.Table.from_batches(held))
                held.clear()

        yield append
        if held:
            file.write_table(arrow.Table.from_batches(held))


def _cell(name: str, value: Any) -> Any:
    # A spreadsheet would run a cell that begins as a formula does.
    return no_formula(value, "./" if name == "path" else " ") if isinstance(value, str) else value
