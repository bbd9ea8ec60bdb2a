"""Whether a resumed run matches the original one: the same model, optimizer, data and initial weights."""

from collections.abc import Collection, Mapping
from typing import Any

from train_clip.errors import UserError

MOST_NAMED = 4  # values in a message


def require_same(own: Mapping[str, Any], kept: Mapping[str, Any], message: str, free: Collection[str] = ()) -> None:
    """Refuse to go on with other values, nested or not, than the run's: ``kept``, but for what is ``free`` to differ.

    The message has both values in place of ``{found}``.
    """
    now, then = (_flat({name: values[name] for name in values if name not in free}) for values in (own, kept))
    differ = [name for name in now | then if now.get(name) != then.get(name)]
    if differ:
        found = "; ".join(f"{name} {now.get(name)}, was {then.get(name)}" for name in differ[:MOST_NAMED])
        raise UserError(message.replace("{found}", found))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
