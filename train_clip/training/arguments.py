"""The arguments of a module against those that a run began with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from train_clip.errors import UserError

MOST_NAMED = 4  # arguments in a message


def require_same_arguments(own: Mapping[str, Any], kept: Mapping[str, Any], free: Collection[str]) -> None:
    """Refuse to go on with another model, or with another way of training it.

    Args:
        own: a module's ``hparams``.
        kept: those that the run began with.
        free: names of what may differ.

    Raises:
        UserError: something else differs; the message has both values.
    """
    now, then = (
        _flat({name: value for name, value in arguments.items() if name not in free}) for arguments in (own, kept)
    )
    differ = [name for name in now | then if now.get(name) != then.get(name)]
    if differ:
        found = "; ".join(f"{name} {now.get(name)}, was {then.get(name)}" for name in differ[:MOST_NAMED])
        raise UserError(
            f"The run began with another model or optimizer (found {found}), and its checkpoint holds their state. "
            "Give the earlier values, or leave them out; to train with others begin a new run."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
