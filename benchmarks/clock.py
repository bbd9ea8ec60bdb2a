"""The clock of the benchmarks: the processor's on a CPU, which other programs hardly change, the wall's on a GPU."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds, once the GPU, where there is one, has done what it was given."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
