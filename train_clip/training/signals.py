"""Stopping a run from outside: the first SIGTERM or Ctrl-C asks, the second insists."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


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


def outlive_the_first_signal(_: int) -> None:
    """For loader processes, which a signal to the whole group reaches too: the batch in hand still needs them."""
    StopSignals().install()
