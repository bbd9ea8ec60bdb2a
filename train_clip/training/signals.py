"""Stopping a run from outside: the first SIGTERM or Ctrl-C ends the batch, the second ends the process."""

import atexit
import multiprocessing
import os
import signal
import threading
import time

STOPPING = (signal.SIGTERM, signal.SIGINT)
STARTER = "TRAIN_CLIP_STARTER"  # in the environment: the number of a run's first process
GRACE = 10.0  # seconds in which the others may end by themselves


class Stopped(SystemExit):
    """Ends the process with the code that shells report a signal by: 128 and its number, 143 for SIGTERM."""


class StopSignals:
    """Notes the first signal, for whoever reads ``received`` at the end of the batch; a second one acts at once."""

    received = 0

    def install(self) -> None:
        """Take both signals over, in the main thread; elsewhere Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, signal.SIG_DFL if self.received else self._note)

    def _note(self, number: int, _: object) -> None:
        self.received = number
        self.install()


def end_with_starter() -> None:
    """Of the processes that Lightning starts, end each some seconds after the first one, should that be killed.

    The first process leaves its number in the environment. torchrun looks after its own.
    """
    starter = int(os.environ.get(STARTER, os.getpid()))
    if "LOCAL_RANK" not in os.environ or starter == os.getpid():
        os.environ[STARTER] = str(os.getpid())
    elif "TORCHELASTIC_RUN_ID" not in os.environ:

        def end_after() -> None:
            while os.getppid() == starter:
                time.sleep(1)
            time.sleep(GRACE)
            os._exit(128 + signal.SIGTERM)

        threading.Thread(target=end_after, daemon=True).start()


def outlive_the_first_signal(_: int) -> None:
    """For loader processes, which a signal to the group reaches too: the batch needs them. The second one ends them."""

    def end_by_the_next(*_: object) -> None:
        for number in STOPPING:
            signal.signal(number, lambda *_: os._exit(0))

    for number in STOPPING:
        signal.signal(number, end_by_the_next)


def end_loaders_at_exit() -> None:
    """Let a process end while its loader processes are at work: Python sends each one SIGTERM, and waits for it."""

    @atexit.register
    def insist() -> None:
        # More of them, before: two that come at once count as one.
        for child in multiprocessing.active_children():
            while child.daemon and child.is_alive():
                child.terminate()
                child.join(0.05)
