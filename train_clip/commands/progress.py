"""How far a scan is: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import track

LINE_SECONDS = 15.0  # between lines where there is no terminal


def with_progress(loader: Any, what: str) -> Iterator[Any]:
    """Go through something that has a length, and show how many of ``what`` are done."""
    console = Console()
    if console.is_terminal:
        yield from track(loader, description=what, console=console, transient=True)
        return
    last = time.perf_counter()
    for number, item in enumerate(loader, 1):
        yield item
        if time.perf_counter() - last > LINE_SECONDS:
            last = time.perf_counter()
            print(f"{number:,} of {len(loader):,} {what}", flush=True)
