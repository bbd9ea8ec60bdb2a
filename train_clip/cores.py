"""The cores that this process may use, and how many threads PyTorch has there; imports nothing heavy.

A thread too many costs more than it brings: after every operation all wait for the one that is held up.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time

CGROUPS, OWN_CGROUPS, TICKS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/stat")
NUMBER = "OMP_NUM_THREADS"
# How long a thread looks out for work before it sleeps: GNU's OpenMP, which PyTorch's wheels for Linux have, counts
# rounds (by default 300,000, several milliseconds), Intel's and LLVM's milliseconds (200).
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}

_busy = 0.0  # cores that others kept busy while PyTorch was imported
_chosen = False  # whether the number of threads is chosen here


@contextmanager
def fitting_threads() -> Iterator[None]:
    """Import PyTorch within: it has as many threads as there are free cores, which sleep while they wait.

    The user's own variables win, and where PyTorch is imported already nothing changes.
    """
    global _busy, _chosen
    first = "torch" not in sys.modules
    if first and not os.environ.keys() & {*WAITING, "OMP_WAIT_POLICY"}:
        os.environ |= WAITING
    begun = _ticks()
    yield
    if first and "torch" in sys.modules:
        total, idle, own = (now - then for now, then in zip(_ticks(), begun, strict=True))
        _busy = max(0.0, len(_allowed()) * (total - idle - own) / max(1, total))
        _chosen = NUMBER not in os.environ
        share_threads()


def share_threads(processes: int = 1) -> None:
    """Set the threads of each of so many processes that train together on this machine, where the user has not."""
    if _chosen:
        os.environ[NUMBER] = str(number := free_cores(processes))  # which the processes that this one starts inherit
        sys.modules["torch"].set_num_threads(number)


def free_cores(processes: int = 1) -> int:
    """Cores for each of so many processes that work together: what affinity, CPU quota and others' load leave."""
    # Those that work together began together, and each has seen the others begin.
    busy = max(0.0, _busy - (processes - 1))
    return max(1, min(_available(), round(len(_allowed()) - busy)) // processes)


def say_load() -> str:
    """A sentence about threads that are fewer because others are at work; empty where they are not."""
    if not _chosen or (number := free_cores()) >= (most := _available()):
        return ""
    return f"Other processes keep {_busy:.1f} cores busy: using {number} of {most}. {NUMBER}={most} uses them all."


def _available() -> int:
    return max(1, int(min(len(_allowed()), *_quotas(), math.inf)))


def _allowed() -> set[int]:
    # Where there is no affinity (macOS, Windows) all cores are free.
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _quotas() -> Iterator[float]:
    # In cores, of this process's control groups and those around them. A container sees its own group as the root.
    for line in _text(OWN_CGROUPS).splitlines():
        _, controllers, own = line.split(":", 2)
        # Version 2 has one hierarchy, version 1 one for each controller.
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        root = CGROUPS / "cpu" if controllers else CGROUPS
        if "cpu" in (controllers or "cpu").split(","):
            for group in (path for path in (root / own.lstrip("/") / "_").parents if path.is_relative_to(root)):
                quota, _, period = " ".join(_text(group / file) for file in files).partition(" ")
                if quota.isdigit():  # not "max" or -1
                    yield int(quota) / int(period)


def _ticks() -> tuple[float, float, float]:
    # Hundredths of a second of this process's cores: all, those with nothing to do (or a disk to wait for), its own.
    cores = {f"cpu{core}" for core in _allowed()}
    rows = [[*map(int, row[1:9])] for row in map(str.split, _text(TICKS).splitlines()) if row[0] in cores]
    return sum(map(sum, rows)), sum(sum(row[3:5]) for row in rows), 100 * process_time()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
