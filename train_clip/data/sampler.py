"""The order of the data: decided by (seed, epoch), placed by the count of global batches.

N  pairs      G  pairs of a global batch      W  processes

An epoch is a permutation of the pairs cut into N // G global batches of G; process r reads the r-th of W equal slices
of each. The N mod G pairs that are left over differ from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


class GlobalBatchSampler(DistributedSampler[Any]):
    """This process's (epoch, index) keys of as many global batches as an epoch has, from the next one on.

    A ``DistributedSampler`` so that Lightning leaves it in place. The position is the count of consumed global batches
    at the moment of ``iter()``; ``set_epoch``, which Lightning calls too late for a loader that has begun to prefetch,
    is not heard. Iteration runs on into the next epoch where it began within one: the Trainer stops it by its own
    count, also where that ends epochs early (``limit_train_batches``), and no batch is left out.

    Args:
        dataset: sized N.
        global_batch: G, a multiple of the number of processes.
        consumed: how many global batches have been trained on since the run began.
        shuffle: permute each epoch; otherwise in order.
        seed: decides the permutations.
        process: (rank, W).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        global_batch: int,
        consumed: Callable[[], int],
        shuffle: bool,
        seed: int,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        rank, world_size = process
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.global_batch = global_batch
        self.consumed = consumed
        self.num_pairs = len(dataset)  # type: ignore[arg-type]

    @property
    def batches_per_epoch(self) -> int:
        """N // G."""
        return self.num_pairs // self.global_batch

    def __len__(self) -> int:
        """Keys of a whole epoch on this process."""
        return self.batches_per_epoch * (self.global_batch // self.num_replicas)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self._keys(self.consumed())

    def _keys(self, first: int) -> Iterator[tuple[int, int]]:
        share = self.global_batch // self.num_replicas
        current, order = -1, np.empty(0)
        for position in range(first, first + self.batches_per_epoch):
            epoch, batch = divmod(position, self.batches_per_epoch)
            if epoch != current:
                current, order = epoch, self._order(epoch)
            start = batch * self.global_batch + self.rank * share
            yield from ((epoch, int(index)) for index in order[start : start + share])

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_pairs)
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_pairs)
