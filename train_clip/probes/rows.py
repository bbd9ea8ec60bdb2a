"""Rows of a few columns → a CSV table, lines of JSON, or Parquet: complete or absent, a batch in memory at a time."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_clip.errors import UsageError
from train_clip.files import replacing
from train_clip.printing import no_formula
from train_clip.probes.extras import extra

GROUP = 2**13  # rows that are read together, in Parquet
FORMATS = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]


def require_format(path: Path) -> None:
    """Refuse a name that does not say how to write, or a library that is missing, before the work."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: rows are written to {', '.join(FORMATS)}. Give it one of these endings.")
    if path.suffix == ".parquet":
        extra("pyarrow")


@contextmanager
def rows_to(path: Path, columns: dict[str, type]) -> Iterator[Callable[[list[Row]], object]]:
    """Write rows to a file: what this yields takes some at a time."""
    with replacing(path) as beside:
        if path.suffix == ".parquet":
            arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
            schema = arrow.schema(
                [(name, arrow.float64() if of is float else arrow.string()) for name, of in columns.items()]
            )
            held = list[Row]()
            with parquet.ParquetWriter(beside, schema) as writer:

                def append(rows: list[Row], most: int = GROUP) -> None:
                    held.extend(rows)
                    if len(held) >= most:
                        writer.write_batch(arrow.RecordBatch.from_pylist(held, schema))
                        held.clear()

                yield append
                append([], 1)
            return
        with beside.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                yield lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                return
            table = csv.writer(file)
            table.writerow(columns)
            yield lambda rows: table.writerows([[_cell(name, row[name]) for name in columns] for row in rows])


def _cell(name: str, value: Any) -> Any:
    # A spreadsheet would run a cell that begins as a formula does.
    return no_formula(value, "./" if name == "path" else " ") if isinstance(value, str) else value
