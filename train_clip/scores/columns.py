"""What a column of a table says of each image."""

from dataclasses import replace
from itertools import chain

from train_clip.data import table
from train_clip.options import SourceOptions


def values(options: SourceOptions, column: str) -> dict[str, list[str]]:
    """By the image's path, the different values of its rows, in their order; a cell of JSON may be a list of them."""
    assert options.pairs is not None
    found = table.scan_table(options.pairs, replace(options, caption_column=column))
    if found.faults:
        found.require_pairs()
    return {pair.image: list(dict.fromkeys(pair.texts)) for pair in chain(found.pairs)}
