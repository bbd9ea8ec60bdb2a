"""Which 64-bit hashes are nearly equal, without comparing all with all.

Two numbers that differ in at most K bits agree entirely in one of K + 1 pieces that both are cut into. So only those
that share a piece are compared (multi-index hashing: Norouzi, Punjani, Fleet, CVPR 2012).

U  different hashes
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

NEAR_BITS = 4  # of 64; what recompression and resizing change in a pHash
BLOCK = 2**20  # comparisons at a time


def near_pairs(
    hashes: NDArray[np.uint64], most: int = NEAR_BITS
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Find the pairs of hashes that differ in at most ``most`` bits.

    Args:
        hashes: (U,) uint64, all different.
        most: bits.

    Yields:
        Places (n,) and (n,) of two such hashes each. A pair can come more than once.
    """
    edges = np.linspace(0, 64, most + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        piece = (hashes >> low) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(piece[order]) != 0])
        ends = np.r_[starts[1:], len(order)]
        shared = ends - starts > 1
        for start, end in zip(starts[shared], ends[shared], strict=True):
            yield from _compare(hashes, order[start:end], most)


def _compare(
    hashes: NDArray[np.uint64], places: NDArray[np.int64], most: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All with all, in blocks of rows."""
    here = hashes[places]
    rows = max(1, BLOCK // len(places))
    for start in range(0, len(places), rows):
        different = _count_bits(here[start : start + rows, None] ^ here[None, start:])
        one, other = np.nonzero(different <= most)
        later = other > one
        if later.any():
            yield places[start + one[later]], places[start + other[later]]


# Bits that are set in each 16-bit number.
_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)


def _count_bits(numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return _BITS[np.ascontiguousarray(numbers).view(np.uint16).reshape(*numbers.shape, 4)].sum(-1, dtype=np.uint8)
