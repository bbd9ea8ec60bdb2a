"""How many cores this process may use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores that this process may use."""
    # Where there is no affinity (macOS, Windows) all cores are free.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
