"""Which pairs are trained on, which are held out. Neither machine nor number of processes decides it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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

    Raises:
        UserError: the share is no such number.
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


@dataclass(frozen=True)
class Shares:
    """How pairs are divided.

    Args:
        validation: share of the pairs, in [0, 1).
        test: likewise; together below 1.
        seed: decides which.
        most_per_class: pairs of a class that are kept at most.
    """

    validation: float
    test: float
    seed: int
    most_per_class: int | None = None


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
    order = sorted(groups, key=lambda content: _hash(f"{shares.seed}:".encode() + content))
    if shares.most_per_class is not None:
        groups = _cap(groups, order, classes, shares.most_per_class)
    total = sum(map(len, groups.values()))
    room = {"test": round(shares.test * total), "val": round(shares.validation * total)}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for content in order:
        group = groups[content]
        part = next((part for part, left in room.items() if 0 < len(group) <= left), "train")
        if part in room:
            room[part] -= len(group)
        parts[part] += group
    return {part: sorted(indices) for part, indices in parts.items()}


def require_share(name: str, share: float) -> None:
    """Refuse what is no share.

    Raises:
        UserError: it is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"{name} is {share}; expected a share from 0 (none) to below 1.")


def _cap(
    groups: dict[bytes, list[int]], order: Sequence[bytes], classes: Sequence[str], most: int
) -> dict[bytes, list[int]]:
    """Keep the first pairs of each class in the order."""
    kept: Counter[str] = Counter()
    capped: dict[bytes, list[int]] = {}
    for content in order:
        capped[content] = []
        for index in groups[content]:
            if kept[classes[index]] < most:
                kept[classes[index]] += 1
                capped[content].append(index)
    return capped


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
