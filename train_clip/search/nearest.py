"""Which embeddings are most similar to others: compared with each one, in blocks.

N  embeddings      n  of a block      Q  queries      D  embedding width      k  results
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

QUERIES = 256  # compared at a time with a block


class Nearest(NamedTuple):
    """The results for a query, the most similar first; of equal ones the first row, which is the order of keys."""

    rows: np.ndarray  # (k) int64
    similarities: np.ndarray  # (k) float64


NONE = Nearest(np.empty(0, np.int64), np.empty(0))


def nearest(blocks: Iterable[np.ndarray], queries: np.ndarray, k: int) -> list[Nearest]:
    """Find the k embeddings whose product with a query is greatest, exact in float64; rows of NaN are passed over.

    Float32 chooses, within its rounding, what is compared in float64, a row by itself: where a row stands among others
    changes nothing, so that equal rows are equally similar.

    Args:
        blocks: (n, D) float32, unit norm, of N embeddings in all.
        queries: (Q, D) float32, unit norm.
        k: results for each query; there are fewer where N is.
    """
    found, first = [NONE] * len(queries), 0
    for block in blocks:
        for start in range(0, len(queries), QUERIES):
            some = queries[start : start + QUERIES]
            with np.errstate(over="ignore", invalid="ignore"):
                similar = some @ block.T
            for place, (query, row) in enumerate(zip(some, similar, strict=True), start):
                found[place] = _merge(found[place], first, _candidates(block, query, row, found[place], k), k)
        first += len(block)
    return found


def _candidates(block: np.ndarray, query: np.ndarray, similar: np.ndarray, known: Nearest, k: int) -> Nearest:
    """What of a block may be among the k nearest, and its similarities in float64."""
    similar = np.where(np.isfinite(similar), similar, -np.inf)
    least = np.partition(similar, -k)[-k] if len(similar) > k else -np.inf
    if len(known.rows) == k:
        least = max(least, known.similarities[-1])
    # Either side of the comparison is off by up to D · eps / 2 (Higham, 2002, section 3.1).
    (rows,) = np.nonzero((similar >= least - len(query) * np.finfo(np.float32).eps) & (similar > -np.inf))
    return Nearest(rows, (block[rows].astype(np.float64) * query).sum(axis=1))


def _merge(known: Nearest, first: int, others: Nearest, k: int) -> Nearest:
    rows = np.concatenate([known.rows, first + others.rows])
    similarities = np.concatenate([known.similarities, others.similarities])
    order = np.lexsort([rows, -similarities])[:k]
    return Nearest(rows[order], similarities[order])
