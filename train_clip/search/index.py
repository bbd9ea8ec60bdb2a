"""An index by usearch for more embeddings than are compared one by one: built once, and kept beside their file."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from train_clip.commands.progress import with_progress
from train_clip.cores import free_cores
from train_clip.errors import UserError, first_line
from train_clip.estimates import require_room, size
from train_clip.files import replacing, write_text
from train_clip.optional import optional
from train_clip.search.nearest import Nearest, nearest
from train_clip.search.vectors import Vectors

EDGES = 300  # bytes of a row beside its numbers, at most: about 150 in the file (benchmarks/search.py)
EXPANSION = 128  # candidates that a search keeps, twice as many as usearch does by itself
RECALL_AT = 10
STEP = 1024  # embeddings between looks at the clock


class Index:
    """The index of a file of embeddings, mapped; opened, or built where there is none of the same content.

    Args:
        vectors: the file of embeddings.
        probes: gives (Q, D) float32, unit norm: queries by which the recall of an index that is built is measured.
    """

    def __init__(self, vectors: Vectors, probes: Callable[[], np.ndarray]) -> None:
        what = f"{vectors.path}: an index of {len(vectors):,} embeddings"
        self._usearch = optional("usearch.index", what, "pass --exact to compare with each one")
        self._path, told = Path(f"{vectors.path}.usearch"), Path(f"{vectors.path}.usearch.json")
        state = vectors.path.stat()
        of = {"size": state.st_size, "modified": state.st_mtime_ns, **vectors.about, "expansion": EXPANSION}
        known: Any = None
        with suppress(OSError, ValueError):
            known = json.loads(told.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or known.get("of") != of or not self._path.is_file():
            self._build(vectors)
            recall = self._recall(vectors, probes())
            # Last: without it the index counts for nothing.
            write_text(told, json.dumps({"of": of, f"recall@{RECALL_AT}": recall}, indent=2) + "\n")
        self._open(vectors)

    def __call__(self, queries: np.ndarray, k: int) -> list[Nearest]:
        """Find the k embeddings that are most similar to each of (Q, D) queries, or most of them."""
        found, results = self._index.search(queries, k, threads=free_cores()), list[Nearest]()
        for one in found if len(queries) > 1 else [found]:
            order = np.lexsort([one.keys, one.distances])  # float16 has ties
            results.append(Nearest(one.keys[order].astype(np.int64), 1.0 - one.distances[order].astype(np.float64)))
        return results

    def embedding(self, row: int) -> np.ndarray:
        """The (D) embedding of a row, float32; NaN where it is left out."""
        found = self._index.get(row)
        return np.full(self._index.ndim, np.nan, np.float32) if found is None else np.asarray(found, np.float32).ravel()

    def _build(self, vectors: Vectors) -> None:
        number = len(vectors)
        room = number * (2 * vectors.about["dim"] + EDGES)
        free = require_room(self._path, room, "the index takes")
        print(
            f"{self._path}: building an index, which takes {size(room)} of memory and of disk ({size(free)} are free)."
        )
        index = self._usearch.Index(ndim=vectors.about["dim"], metric="cos", dtype="f16")
        first = 0
        for block in counted(vectors):
            finite = np.isfinite(block).all(axis=1)
            index.add(first + np.flatnonzero(finite), block[finite], threads=free_cores())
            first += len(block)
        with replacing(self._path) as beside:
            index.save(str(beside))

    def _open(self, vectors: Vectors) -> None:
        try:
            self._index: Any = self._usearch.Index.restore(str(self._path), view=True)
            if self._index is None or self._index.ndim != vectors.about["dim"]:
                raise ValueError("another index")
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self._path}: no index of these embeddings, or damaged ({first_line(error)}). Remove it: it will be "
                "built again."
            ) from error
        self._index.expansion_search = EXPANSION

    def _recall(self, vectors: Vectors, probes: np.ndarray) -> float:
        self._open(vectors)
        pairs = zip(self(probes, RECALL_AT), nearest(counted(vectors), probes, RECALL_AT), strict=True)
        recall = float(np.mean([np.isin(exact.rows, found.rows).mean() for found, exact in pairs]))
        print(f"Of the {RECALL_AT} most similar embeddings it finds {recall:.1%} ({len(probes):,} queries).")
        return recall


def counted(vectors: Vectors) -> Iterator[np.ndarray]:
    """Read all embeddings by blocks, and show how far that is and how long it takes."""
    loader: Any = DataLoader(range(len(vectors)), STEP, collate_fn=len)  # type: ignore[arg-type]
    steps, done = with_progress(loader, "embeddings"), 0
    for block in vectors.blocks():
        yield block
        before, done = done, done + len(block)
        for _ in islice(steps, done // STEP - before // STEP):
            pass
    for _ in steps:
        pass
