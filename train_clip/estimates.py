"""What long work takes, in words: time, and room on a disk."""

import shutil
from datetime import datetime, timedelta
from pathlib import Path

from train_clip.errors import UserError


def remaining(seconds: float, now: datetime | None = None) -> str:
    """How long it takes from here on, and when it is done: "about 1 h 24 min, done at about 17:05 (2026-11-30)".

    The day is said where it is not today, which ``now`` says, in local time.
    """
    now = now or datetime.now()
    end = now + timedelta(seconds=seconds)
    day = f" ({end:%Y-%m-%d})" if end.date() != now.date() else ""
    return f"about {duration(seconds)}, done at about {end:%H:%M}{day}"


def duration(seconds: float) -> str:
    """Seconds as "45 s", "24 min", "1 h 24 min" or "3 d 4 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(num_bytes: float) -> str:
    """Bytes as "12 kB", "345 MB" or "1.2 GB", of powers of ten."""
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:,.0f} kB"
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.1f} GB"


def require_room(place: Path, num_bytes: float, what: str) -> float:
    """Refuse to begin what a file or folder has no room for; the bytes that are free where it is, or will be."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    disk = shutil.disk_usage(there)
    free = disk.free if disk.total else float("inf")  # some network file systems do not tell
    if free < num_bytes:
        raise UserError(
            f"{place}: {size(free)} of disk space are free. Expected room for {size(num_bytes)}, which {what}. Free "
            "space, or write to another disk."
        )
    return free
