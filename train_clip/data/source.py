"""Where pairs come from: a folder or a table."""

from __future__ import annotations

from pathlib import Path

from train_clip.data.folder import PAIRINGS, scan_folder
from train_clip.data.scan import PairBy, Scan
from train_clip.data.table import Columns, scan_table
from train_clip.errors import UserError


def scan_source(folder: Path | None, table: Path | None, columns: Columns, pair_by: PairBy = "stem") -> Scan:
    """Find the pairs of a folder or of a table, whichever is given.

    Args:
        folder: images and captions.
        table: of pairs.
        columns: the table's.
        pair_by: what of their names the files of a folder's pair share.

    Raises:
        UserError: both are given or neither, there is nothing of the kind, or a table is to be paired by number.
    """
    if pair_by not in PAIRINGS:
        raise UserError(f"pair_by is {pair_by!r}; expected one of {', '.join(PAIRINGS)}.")
    if folder is not None and table is not None:
        raise UserError(f"Both a folder ({folder}) and a table of pairs ({table}) were given; expected one of them.")
    if folder is not None:
        return scan_folder(folder, pair_by)
    if table is not None:
        if pair_by != "stem":
            raise UserError(f"--pair_by {pair_by}: is for a folder; {table} says itself what belongs together.")
        return scan_table(table, columns)
    raise UserError("No data was given. Expected a folder of images and captions, or a table of pairs (--pairs).")
