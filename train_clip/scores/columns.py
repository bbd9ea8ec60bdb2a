"""What a column of a table says of each image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from train_clip.data import table
from train_clip.errors import UsageError, UserError
from train_clip.evaluation import zero_shot
from train_clip.options import SourceOptions


def values(options: SourceOptions, column: str, option: str) -> dict[str, list[str]]:
    """By the image's path, as ``pathlib`` writes it, the different values of its rows, of which JSON may have lists.

    The column is named by an option.
    """
    assert options.pairs is not None
    found = table.scan_table(options.pairs, replace(options, caption_column=column), option)
    if found.faults:
        found.require_pairs()
    return {str(Path(pair.image)): list(dict.fromkeys(pair.texts)) for pair in found.pairs}


def label_sets(paths: list[str], classes: list[str], options: Any) -> list[list[int]]:
    """The classes of each image, as places in their list; where some images have several, others may have none."""
    column = options.class_column
    if options.pairs is None or not classes:
        raise UsageError(
            f"--class_column {column}: is a column of a table, of classes of a list. Expected both: --pairs, --classes."
        )
    of_image = values(options, column, "--class_column")

    def named(path: Path) -> list[str]:
        return of_image.get(str(path), [])

    labels = zero_shot.label_sets(paths, classes, named, f"the column {column!r}")
    if max(map(len, labels)) < 2 and [] in labels:
        raise UserError(f"{paths[labels.index([])]}: has no class in the column {column!r}. Expected one in each row.")
    return labels
