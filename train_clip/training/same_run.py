"""Whether a run that goes on is the one that began: the same model, optimizer, data and start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from train_clip.errors import UserError
from train_clip.options import TrainingOptions

MOST_NAMED = 4  # values in a message


def require_same(own: Mapping[str, Any], kept: Mapping[str, Any], message: str, free: Collection[str] = ()) -> None:
    """Refuse to go on with other values than a run began with.

    Args:
        own: values by their names, nested or not; one that is missing counts as None.
        kept: those that the run began with.
        message: what to say, with ``{found}`` for the values that differ.
        free: names of what may differ.

    Raises:
        UserError: something else differs; the message has both values.
    """
    now, then = ({name: value for name, value in _flat(values) if name not in free} for values in (own, kept))
    differ = [name for name in now | then if now.get(name) != then.get(name)]
    if differ:
        found = "; ".join(f"{name} {now.get(name)}, was {then.get(name)}" for name in differ[:MOST_NAMED])
        raise UserError(message.format(found=found))


def completed(kept: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The ``hparams`` of a checkpoint, with the options that the version that wrote it did not have yet.

    It did what their defaults do; where the preset decides (None), what it decides for this module, ``own``.
    """
    defaults = TrainingOptions().flat()
    missing = {name: own.get(name) if value is None else value for name, value in defaults.items() if name not in kept}
    return missing | dict(kept)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The values of nested mappings, their names joined by dots."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
