"""Stopping a run from outside: the first signal ends the batch and saves, a second SIGTERM or Ctrl-C the process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from train_clip.errors import UserError
from train_clip.gather import WAIT
from train_clip.training import lightning_internals

HANGUP = getattr(signal, "SIGHUP", 0)  # a terminal closes, and sends it once or twice; Windows has none
STOPPING = (signal.SIGTERM, signal.SIGINT, *filter(None, [HANGUP]))
STARTER = "TRAIN_CLIP_STARTER"  # in the environment: the number of a run's first process
GRACE = 10.0  # seconds in which the others may end by themselves
LONGEST = 600.0  # seconds in which no batch comes: something hangs
PATIENCE = 3.0  # seconds after a signal in which what the run waits for may still come
TOGETHER = 0.5  # seconds in which two are one: timeout(1) sends one to the process and one to its group

END_WAIT = getattr(signal, "SIGURG", None)  # from the thread to the main thread; nobody else means anything by it
SAVING = threading.Lock()  # held while the run is saved after an error


class Stopped(SystemExit):
    """Ends the process with the code that shells report a signal by: 128 and its number, 143 for SIGTERM."""


class StopSignals:
    """Notes a signal, for whoever reads ``received`` at the end of the batch, and says so; a second one acts at once.

    Python calls handlers between two of its instructions, and a backward pass, which is one, may take minutes. A thread
    learns of a signal at once, by what Python writes to a socket. Where the run waits, for a batch or for other
    processes, and that goes on, the thread ends the wait: by ``Stopped`` in the main thread, or with the process.
    """

    received = 0
    wakeup: socket.socket | None = None

    def install(self, saves: bool = False) -> None:
        """Take the signals over, in the main thread; elsewhere Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        take_over(self._note)
        if END_WAIT is not None:
            signal.signal(END_WAIT, self._end_wait)
            signal.signal(signal.SIGCHLD, lightning_internals.raise_in_waits)
        if self.wakeup is None:
            reader, self.wakeup = socket.socketpair()
            reader.settimeout(TOGETHER)
            self.wakeup.setblocking(False)
            self.before = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_act_at_once, args=(reader, saves), daemon=True).start()

    def release(self) -> None:
        """End the thread. The handlers are Lightning's to give back."""
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.before)
            with self.wakeup:
                self.wakeup.shutdown(socket.SHUT_WR)  # loader processes hold copies
            self.wakeup = None

    def _note(self, number: int, _: object) -> None:
        self.received = number

    def _end_wait(self, *_: object) -> None:
        if self.received and WAIT.since:
            raise Stopped(128 + self.received)
        if WAIT.for_batch:
            raise UserError(
                f"No batch came for {LONGEST / 60:.0f} minutes. Look whether the disk of the data answers, and whether "
                "loader processes have memory (free, df /dev/shm); --num_workers 0 reads without them."
            )


def _act_at_once(reader: socket.socket, saves: bool) -> None:
    """Say what the first signal does, and end the process at a second one."""
    first, before, code, name, main = 0.0, 0, 0, "", threading.main_thread().ident or 0
    with reader:
        while True:
            try:
                if not (read := reader.recv(1)):
                    return
            except TimeoutError:
                if first and WAIT.lasts(GRACE, first):
                    _say(f"{name}: ended without saving, because another process did not answer.")
                    os._exit(code)
                is_over = WAIT.lasts(PATIENCE, first) if first else WAIT.for_batch and WAIT.lasts(LONGEST)
                if is_over and END_WAIT is not None:
                    signal.pthread_kill(main, END_WAIT)
                continue
            # A hang-up shows nobody's impatience: neither comes second.
            number, is_second = read[0], before not in (0, HANGUP)
            repeats = before > 0 if number == HANGUP else is_second and time.monotonic() - first < TOGETHER
            if number not in STOPPING or repeats:
                continue
            first, before, code, name = time.monotonic(), number, 128 + number, name_of(number)
            line = f"{name} again: ended without saving."
            if not is_second:
                line = (
                    f"{name}: the run {'saves and ' * saves}stops at the end of this step, or of the epoch if this is "
                    f"its last. A second {'SIGTERM' if number == HANGUP else name} ends it at once, without saving."
                )
            _say(line)
            if is_second:
                os._exit(code)


def _say(line: str) -> None:
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        with suppress(OSError):
            # Past Python's buffers, which the main thread may be about to write.
            os.write(2, f"\n{line}\n".encode())


def end_of(child: subprocess.Popen[bytes]) -> str:
    """How a process of the run has failed, in a line; empty where it has not."""
    if (code := child.poll() or 0) >= 0:
        return f"Process {child.pid} of the run ended with code {code}." if code else ""
    why = ", most likely for lack of memory (dmesg tells)" if code == -signal.SIGKILL else ""
    return f"Process {child.pid} of the run was killed by {signal.Signals(-code).name}{why}."


def end_after(children: Callable[[], list[subprocess.Popen[bytes]]], seconds: float) -> None:
    """End this process so many seconds after one of those that it has started by then failed: it may wait for it."""
    _end_when(lambda: next(filter(None, map(end_of, children())), ""), seconds, 1)


def _end_when(failure: Callable[[], str], seconds: float, code: int) -> None:
    def watch() -> None:
        while not (failed := failure()):
            time.sleep(1)
        time.sleep(seconds)
        with SAVING:
            _say(f"{failed} Ended without saving.")
            os._exit(code)

    threading.Thread(target=watch, daemon=True).start()


def name_of(number: int) -> str:
    """What users know a signal by."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def take_over(handler: Any) -> None:
    """Let a handler answer every stopping signal, but a hang-up that is ignored, as under nohup."""
    for number in STOPPING:
        if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_with_starter() -> None:
    """Of the processes that Lightning starts, end each some seconds after the first one, should that be killed.

    The first process leaves its number in the environment. torchrun looks after its own.
    """
    starter = int(os.environ.get(STARTER, os.getpid()))
    if "LOCAL_RANK" not in os.environ or starter == os.getpid():
        os.environ[STARTER] = str(os.getpid())
    elif "TORCHELASTIC_RUN_ID" not in os.environ:
        gone = "The first process of the run was killed."
        _end_when(lambda: "" if os.getppid() == starter else gone, GRACE, 128 + signal.SIGTERM)


def outlive_the_first_signal(_: int) -> None:
    """For loader processes, which a signal to the group reaches too: the batch needs them. The second one ends them."""

    def end_by_the_next(*_: object) -> None:
        take_over(lambda *_: os._exit(0))

    signal.set_wakeup_fd(-1)  # the run's
    if HANGUP:
        signal.signal(HANGUP, signal.SIG_IGN)  # they end with the run
    take_over(end_by_the_next)


def end_loaders() -> None:
    """End this process's loader processes, those too that hang."""
    begun = time.monotonic()
    # More signals, before: two that come at once count as one.
    for child in multiprocessing.active_children():
        while child.daemon and child.is_alive():
            child.terminate()
            child.join(0.05)
            if time.monotonic() - begun > 2 * TOGETHER:
                child.kill()
