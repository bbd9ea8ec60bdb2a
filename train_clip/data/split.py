"""Which pairs are trained on, which are held out. Neither machine nor number of processes decides it."""

import hashlib

from train_clip.data.pairs import PairList, plain_name


def split_pairs(pairs: PairList, share: float) -> tuple[PairList, PairList]:
    """Hold out round(share · len(pairs)), chosen by a hash of the image's name; none in place of a single one.

    The choice depends on names alone: not on a seed, so that runs can be compared, nor on where the folder lies.
    """
    held_out = held_out_indices(pairs, share)
    kept = set(held_out)
    return pairs.take([index for index in range(len(pairs)) if index not in kept]), pairs.take(held_out)


def held_out_indices(pairs: PairList, share: float) -> list[int]:
    """The places of the pairs that ``split_pairs`` holds out, in order."""
    number = round(share * len(pairs))
    if number < 2:
        return []
    plain = (plain_name(name).encode("utf-8", "surrogateescape") for name in pairs.names)
    hashes = [hashlib.sha256(name).digest() for name in plain]
    return sorted(sorted(range(len(pairs)), key=hashes.__getitem__)[:number])
