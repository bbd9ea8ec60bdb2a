"""The class of an image: what ``STEM.cls`` beside it says, or else the folder that it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train_clip.errors import UserError


def image_labels(paths: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Look up the class of each image.

    Args:
        paths: image files. A ``.cls`` file holds a class's name, or its place in the list counted from 0.
        classes: names. Case, and underscores for blanks, make no difference.

    Returns:
        A place in ``classes`` for each path.

    Raises:
        UserError: two classes of one name, or an image whose class is not in the list.
    """
    places = {_plain(name): place for place, name in enumerate(classes)}
    if len(places) < len(classes):
        repeated = next(name for place, name in enumerate(classes) if places[_plain(name)] != place)
        raise UserError(f"The class {repeated!r} stands in the list more than once. Expected each class once.")
    return [_label(Path(path), places) for path in paths]


def class_name(path: Path) -> str:
    """What the ``.cls`` file beside an image says, or else the name of its folder."""
    label_file = path.with_suffix(".cls")
    if not label_file.is_file():
        return path.parent.name
    try:
        return label_file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{label_file}: is not UTF-8. Expected the name of a class. Save it as UTF-8.") from None


def _label(path: Path, places: dict[str, int]) -> int:
    label_file, named = path.with_suffix(".cls"), class_name(path)
    # The name before the number: a class may be called "1".
    if (place := places.get(_plain(named))) is not None:
        return place
    if label_file.is_file() and named.isdecimal() and int(named) < len(places):
        return int(named)
    source = label_file if label_file.is_file() else f"its folder ({path.parent})"
    raise UserError(
        f"{path}: its class is {named!r} by {source}, and that is none of the {len(places)} classes. Expected one of "
        f"them, such as {next(iter(places))!r}. Add the class to the list, name the folder after it, or write "
        f"{label_file.name} with its name or number."
    )


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
