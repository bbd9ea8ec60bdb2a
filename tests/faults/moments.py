"""What tests do inside a command's process, at an exact moment of the training: callbacks, named by their class path.

Run as a program it is the command. In the folder ``$EXIT_CODES`` each process, by its rank, notes that it runs and what
its exit code is.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L

from train_clip import cli


class Record(L.Callback):
    """Appends the number of optimizer steps to a file after each batch, at once, before anything is saved.

    Args:
        file: its name; the process's rank is added to it.
        pause: seconds after each batch, so that whoever watches from outside can keep up.
        until: a file that is waited for after each batch, two minutes at most.
    """

    def __init__(self, file: str, pause: float = 0.0, until: str = "") -> None:
        self.file = file
        self.pause = pause
        self.until = until

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        with Path(f"{self.file}.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step}\n")
        time.sleep(self.pause)
        latest = time.monotonic() + 120
        while self.until and not Path(self.until).exists() and time.monotonic() < latest:
            time.sleep(0.01)


class AtChange(L.Callback):
    """Acts before changes to files: a file is opened to be written, renamed, linked or removed.

    Args:
        path: a part of the paths that count.
        step: only those between a state of that many optimizer steps being taken down, to be saved, and the next
            batch; from the start on where None.
    """

    def __init__(self, path: str, step: int | None = None) -> None:
        self.path = path
        self.step = step
        self.armed = step is None
        sys.addaudithook(self._look)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.armed = self.armed or trainer.global_step == self.step

    def on_train_batch_start(self, *_: Any) -> None:
        self.armed = self.step is None

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in ("open", "os.rename", "os.link", "os.remove"):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if any(self.path in str(path) for path in arguments[:2]):
            self.act(event, str(arguments[0]))

    def act(self, event: str, path: str) -> None:
        raise NotImplementedError


class KillAtChange(AtChange):
    """SIGKILL before one of the changes.

    Args:
        change: which of them, from 1.
        which: as for ``AtChange``.
    """

    def __init__(self, change: int = 1, **which: Any) -> None:
        self.left = change
        super().__init__(**which)

    def act(self, event: str, path: str) -> None:
        self.left -= 1
        if not self.left:
            print(f"Killed before {event} of {path}.", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


class FailAtChange(AtChange):
    """Lets none of the changes happen but removals, as a full disk does."""

    def act(self, event: str, path: str) -> None:
        if event != "os.remove":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


class AtBatch(L.Callback):
    """Acts once, in the batch of that number, on one process.

    Args:
        batch: counted from 1, from the start of this process.
        rank: the process.
        moment: ``forward``, ``backward`` (within either), or ``update`` (between it and the batch's end).
    """

    def __init__(self, batch: int, rank: int = 0, moment: str = "forward") -> None:
        self.left = batch
        self.rank = rank
        self.moment = moment

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.left -= 1
        if self.left or trainer.global_rank != self.rank:
            return

        def act(*_: Any) -> None:
            hook.remove()
            self.act()

        model = pl_module.model
        if self.moment == "forward":
            hook = model.transformer.register_forward_pre_hook(act)
        elif self.moment == "backward":
            # Among the first of all gradients: what the processes exchange in the backward pass comes later.
            hook = model.logit_scale.register_hook(act)
        else:
            hook = trainer.optimizers[0].register_step_post_hook(act)

    def act(self) -> None:
        raise NotImplementedError


class SignalAt(AtBatch):
    """Sends its own process a signal.

    Args:
        number: the signal's.
        where: as for ``AtBatch``.
    """

    def __init__(self, number: int, **where: Any) -> None:
        super().__init__(**where)
        self.number = number

    def act(self) -> None:
        print(f"Signal {self.number} in {self.moment} on rank {self.rank}.", flush=True)
        os.kill(os.getpid(), self.number)


class DeafAt(AtBatch):
    """Has its own process sent a signal, or two, while Python calls no handler, as within a long backward pass.

    Args:
        number: the signal's.
        times: how often it is sent, a second apart.
        where: as for ``AtBatch``.
    """

    def __init__(self, number: int, times: int = 1, **where: Any) -> None:
        super().__init__(**where)
        self.number = number
        self.times = times

    def act(self) -> None:
        subprocess.Popen(f"sleep 0.3; kill -{self.number} {os.getpid()}; sleep 0.7;" * self.times, shell=True)
        # One instruction of Python's; other threads run.
        deque(map(ctypes.CDLL(None).usleep, [1000] * 1500 * self.times), 0)
        print("The step goes on.", flush=True)


class SignalWorkersAt(SignalAt):
    """Sends the loader processes a signal; SIGSTOP makes them hang."""

    def act(self) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, self.number)
        if "EXIT_CODES" in os.environ:
            Path(os.environ["EXIT_CODES"], "acted").touch()


class ShellAt(AtBatch):
    """Runs a line of shell.

    Args:
        line: what to run; it must succeed.
        where: as for ``AtBatch``.
    """

    def __init__(self, line: str, **where: Any) -> None:
        super().__init__(**where)
        self.line = line

    def act(self) -> None:
        subprocess.run(self.line, shell=True, check=True)


def main() -> None:
    """The command, its exit code noted."""
    note = Path(os.environ["EXIT_CODES"], os.environ.get("LOCAL_RANK", "0"))
    note.write_text("runs")
    code: Any = 0
    try:
        cli.main()
    except BaseException as error:
        code = getattr(error, "code", repr(error))
        raise
    finally:
        note.write_text(str(code))


if __name__ == "__main__":
    main()
