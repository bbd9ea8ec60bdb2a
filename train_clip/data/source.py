"""Where pairs come from: a folder or a table."""

from __future__ import annotations

from pathlib import Path

from train_clip.data.folder import scan_folder
from train_clip.data.scan import Scan
from train_clip.data.table import Columns, scan_table
from train_clip.errors import UserError


def scan_source(folder: Path | None, table: Path | None, columns: Columns) -> Scan:
    """Find the pairs of a folder or of a table, whichever is given.

    Raises:
        UserError: both are given or neither, or there is nothing of the kind.
    """
    if folder is not None and table is not None:
        raise UserError(f"Both a folder ({folder}) and a table of pairs ({table}) were given; expected one of them.")
    if folder is not None:
        return scan_folder(folder)
    if table is not None:
        return scan_table(table, columns)
    raise UserError("No data was given. Expected a folder of images and captions, or a table of pairs (--pairs).")
