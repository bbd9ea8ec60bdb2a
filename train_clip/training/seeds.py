"""Seeds of random streams that are told apart by several numbers."""

from __future__ import annotations

import numpy as np


def seed_of(*key: int) -> int:
    """One seed of PyTorch's, from 0 to below 2⁶³, for a key of numbers, 0 or above."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
