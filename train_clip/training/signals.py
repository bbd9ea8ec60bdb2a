"""Stopping a run from outside: the first SIGTERM or Ctrl-C asks, the second insists."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
GRACE = 10.0  # seconds to end by itself


class Stopped(SystemExit):
    """Ends the process as shells report a signal: 143 for SIGTERM, 130 for SIGINT.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class StopSignals:
    """Notes the first signal, for whoever reads ``received`` at the end of the batch; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Take both signals over, in the main thread; elsewhere Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number


def end_with_parent() -> None:
    """End this process some seconds after the one that started it, which no signal tells it of.

    A process that waits for others in a collective operation, as at the start of a run, would wait there for ever.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def outlive_the_first_signal(_: int) -> None:
    """For loader processes, which a signal to the whole group reaches too: the batch in hand still needs them."""
    StopSignals().install()
