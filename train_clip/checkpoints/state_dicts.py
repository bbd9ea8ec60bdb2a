"""Which of a file's tensors are the model: state dicts below any keys, the names of wrappers, models within others."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from train_clip.checkpoints.read import EXPECTED, MOST_SHOWN, Contents, TensorRecord
from train_clip.errors import UserError

T = TypeVar("T")
Records = dict[str, TensorRecord]

MAX_KEYS = 10  # from the beginning of a file's data to a state dict
MOST_CLIPS = 16  # in one state dict
OF_CLIP = ("logit_scale", "token_embedding.weight")  # ends of names in the state dict of a CLIP or of two encoders
SECONDARY = re.compile("ema|teacher|swa|averag|optim", re.IGNORECASE)  # in a place: others are preferred
# What DistributedDataParallel, torch.compile, FSDP and others put into the names of what they wrap.
WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module|_forward_module)\."
)
AVERAGED = "n_averaged"  # a count that PyTorch's AveragedModel keeps beside the model
# A tensor of every CLIP in every format; before it, what is before each name of that CLIP.
EMBEDDING = re.compile(r"((?:.*?\.)??)(?:text\.|text_model\.embeddings\.)?token_embedding\.weight", re.DOTALL)


def choose(contents: Contents) -> Contents:
    """Choose among the state dicts of a PyTorch archive: a CLIP's first, one called state_dict, no EMA's."""
    data = contents.data
    if contents.kind != "PyTorch archive":
        return contents
    held = sorted(_state_dicts(data), key=_preference)
    if not held:
        found = str(list(data)[:6])[:MOST_SHOWN] if isinstance(data, dict) else f"a {type(data).__name__}"
        raise UserError(f"{contents.path}: holds no tensors under names, but {found}.{EXPECTED}")
    (place, around, tensors), *others = held
    left_out = tuple(other for other, _, also in others if _is_clip(also) and not _same(also, tensors))
    return replace(contents, data=around, tensors=tensors, place=place, left_out=left_out)


def _state_dicts(data: Any) -> Iterator[tuple[str, dict[str, Any], Records]]:
    """Find every mapping of names to tensors: its place, the mapping that it is in, itself. Data may hold itself."""
    waiting: list[tuple[tuple[Any, ...], Any, Any]] = [((), data, data)]
    seen = set()
    for keys, around, part in waiting:
        if id(part) in seen or len(keys) > MAX_KEYS or not isinstance(part, dict | list | tuple):
            continue
        seen.add(id(part))
        items = list(part.items() if isinstance(part, dict) else enumerate(part))
        if tensors := {name: one for name, one in items if isinstance(name, str) and isinstance(one, TensorRecord)}:
            place = ".".join(str(key)[:MOST_SHOWN] for key in keys)
            yield place, around if isinstance(around, dict) else {}, tensors
        waiting += [((*keys, key), part, one) for key, one in items if isinstance(one, dict | list | tuple)]


def _preference(held: tuple[str, Any, Records]) -> tuple[bool, bool, bool, int]:
    place, _, tensors = held
    is_clip = _is_clip(tensors)
    return not is_clip, place != "state_dict", bool(SECONDARY.search(place)), 0 if is_clip else -len(tensors)


def _is_clip(tensors: Records) -> bool:
    return any(name.endswith(OF_CLIP) for name in tensors)


def _same(some: Records, others: Records) -> bool:
    return list(some.values()) == list(others.values())


def unwrapped(contents: Contents) -> Contents:
    """Take what wrappers added out of names, unless two names would then be one."""
    kept = [name for name in contents.tensors if name.rpartition(".")[2] != AVERAGED]
    tensors = {WRAPPERS.sub("", name): contents.tensors[name] for name in kept}
    return replace(contents, tensors=tensors) if len(tensors) == len(kept) else contents


def clip_in(contents: Contents) -> Contents:
    """Take a CLIP out of what it is a part of, such as a module of Lightning's; of several the first, but no EMA."""
    found = filter(None, map(EMBEDDING.fullmatch, contents.tensors))
    prefixes = sorted(dict.fromkeys(one[1] for one in found), key=lambda prefix: bool(SECONDARY.search(prefix)))
    clips: dict[str, Records] = {prefix: {} for prefix in prefixes[:MOST_CLIPS]}
    if not clips:
        return contents
    around = []
    for name, record in contents.tensors.items():
        if (prefix := max(filter(name.startswith, clips), key=len, default=None)) is None:
            around.append(name)
        else:
            clips[prefix][name.removeprefix(prefix)] = record
    first, *others = clips
    places = {prefix: f"{contents.place}.{prefix}".strip(".") for prefix in clips}
    left_out = (places[prefix] for prefix in others if not _same(clips[prefix], clips[first]))
    return replace(
        contents, tensors=clips[first], place=places[first], left_out=(*contents.left_out, *left_out, *around)
    )


def renamed(tensors: Mapping[str, T], names: Mapping[str, Any]) -> dict[str, T]:
    """Tensors under a model's own names, where these are the same without what wrappers add: it may be one of them."""
    own = {WRAPPERS.sub("", name): name for name in names}
    found = {own.get(WRAPPERS.sub("", name), name): tensor for name, tensor in tensors.items()}
    return found if len(found) == len(tensors) else dict(tensors)
