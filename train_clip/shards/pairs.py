"""Pairs in shards, in an order that reads each shard for a while: a function of (seed, epoch), whoever reads.

N  pairs      n  pairs of a source      S  shards
"""

from collections.abc import Iterable, Sequence

import numpy as np
from typing_extensions import override

from train_clip.data.pairs import PairList
from train_clip.files import IN_TAR

WINDOW = 16  # shards whose pairs are shuffled together: what others call the shuffle buffer


class ShardPairs(PairList):
    """Pairs of one or several sources.

    Args:
        root: as in ``PairList``; images and captions are SHARD.tar!NAME.
        images: one after another those of a source, and of a shard.
        captions: likewise.
        sources: (N) int, the source of each pair.
        weights: how often an epoch has each pair of a source: 2 is twice, 0.5 every other epoch.
    """

    def __init__(
        self,
        root: str,
        images: Iterable[str],
        captions: Iterable[str],
        sources: Sequence[int] | np.ndarray,
        weights: Sequence[float],
    ) -> None:
        super().__init__(root, images, captions)
        self.sources, self.weights = np.asarray(sources, np.int32), tuple(weights)
        shards = dict[str, int]()
        self.shards = np.fromiter(
            (shards.setdefault(name.partition(IN_TAR)[0], len(shards)) for name in self.names), np.int32, len(self)
        )

    @override
    def take(self, indices: Sequence[int]) -> "ShardPairs":
        plain = super().take(indices)
        return ShardPairs(self.root, *plain._columns[:2], self.sources[list(indices)], self.weights)

    @property
    @override
    def per_epoch(self) -> int:
        return sum(self._taken())

    @override
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The places of an epoch's pairs, ``per_epoch`` of them: each pair once where all weights are 1.

        Each source is a stream of its pairs, all of them shuffled and then all of them again; an epoch takes the next
        round(weight · n) of each, at least one, mixed at random.
        """
        taken = self._taken()
        mixed = np.random.default_rng((seed, epoch)).permutation(np.repeat(np.arange(len(taken)), taken))
        order = np.empty(len(mixed), np.int64)
        for source, number in enumerate(taken):
            own, first = np.flatnonzero(self.sources == source), epoch * number
            rounds = range(first // len(own), -(-(first + number) // len(own))) if number else range(0)
            stream = [own[self._shuffled(self.shards[own], (seed, source, one))] for one in rounds]
            if stream:
                start = first - rounds.start * len(own)
                order[mixed == source] = np.concatenate(stream)[start : start + number]
        return order

    def _taken(self) -> list[int]:
        counts = np.bincount(self.sources, minlength=len(self.weights))
        return [max(round(weight * int(n)), min(1, int(n))) for weight, n in zip(self.weights, counts, strict=True)]

    @staticmethod
    def _shuffled(shards: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """Shuffle the shards, and within every ``WINDOW`` of them the pairs."""
        rng = np.random.default_rng(seed)
        found, own = np.unique(shards, return_inverse=True)
        windows = rng.permutation(len(found))[own] // WINDOW
        return np.lexsort([rng.random(len(shards)), windows])
