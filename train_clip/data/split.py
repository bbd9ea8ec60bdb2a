"""Which pairs are trained on, which are held out. Neither machine nor number of processes decides it."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train_clip.data.pairs import PairList, plain_name
from train_clip.errors import UserError


def split_pairs(pairs: PairList, share: float) -> tuple[PairList, PairList]:
    """Hold out a share of the pairs, chosen by a hash of the image's name.

    The choice depends on names alone: not on a seed, so that runs can be compared, nor on where the folder lies.

    Args:
        pairs: all of them.
        share: in [0, 1).

    Returns:
        Those to train on, and round(share · len(pairs)) to validate on; none where that is a single one, among which
        retrieval is always right.
    """
    require_share("val_share", share)
    held_out = held_out_indices(pairs, share)
    kept = set(held_out)
    return pairs.take([index for index in range(len(pairs)) if index not in kept]), pairs.take(held_out)


def held_out_indices(pairs: PairList, share: float) -> list[int]:
    """The places of the pairs that ``split_pairs`` holds out, in order."""
    number = round(share * len(pairs))
    if number < 2:
        return []
    hashes = [_hash(plain_name(name).encode("utf-8", "surrogateescape")) for name in pairs.names]
    return sorted(sorted(range(len(pairs)), key=hashes.__getitem__)[:number])


def require_share(name: str, share: float) -> None:
    """Refuse what is no share, with a ``UserError``."""
    if not 0 <= share < 1:
        raise UserError(f"{name} is {share}; expected a share from 0 (none) to below 1.")


class Shares(NamedTuple):
    """How pairs are divided."""

    validation: float  # share of the pairs, in [0, 1)
    test: float  # likewise; together below 1
    seed: int  # decides which
    most_per_class: int | None = None  # pairs of a class that are kept at most


def divide(contents: Sequence[bytes], classes: Sequence[str], shares: Shares) -> dict[str, list[int]]:
    """Divide pairs into ``train``, ``val`` and ``test``; those whose images are the same stay together.

    The order in which pairs are taken is that of a hash of the seed and the image's content, so that neither names nor
    the machine matter.

    Args:
        contents: a digest of each pair's image.
        classes: the class of each pair; not looked at without a cap.
        shares: how.

    Returns:
        The places of each part's pairs, in order. Test and validation hold the wanted number or, where a group of equal
        images does not fit, a little less.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        groups[content].append(index)
    taken = [groups[content] for content in sorted(groups, key=lambda one: _hash(f"{shares.seed}:".encode() + one))]
    if (most := shares.most_per_class) is not None:
        seen: dict[str, Iterator[int]] = defaultdict(itertools.count)
        taken = [[index for index in group if next(seen[classes[index]]) < most] for group in taken]
    total = sum(map(len, taken))
    room = {"test": round(shares.test * total), "val": round(shares.validation * total), "train": total}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for group in filter(None, taken):
        part = next(part for part, left in room.items() if len(group) <= left)
        room[part] -= len(group)
        parts[part] += group
    return {part: sorted(indices) for part, indices in parts.items()}


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
