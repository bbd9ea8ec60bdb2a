"""Python processes that start in milliseconds: forked from a server that has imported torch and Lightning already.

Each is a process of its own, in a session of its own, with its own words, folder, variables and streams; its program
is ``__main__``, its parent waits for it alone, and it ends as an interpreter does. Only what a process inherits from
the imports themselves (the seed of ``hash``) is the same in all of them, and pictures are left empty, as in the tests'
own process. The package is not imported ahead.

This file run as a program is the server. It has one thread and computes nothing, and it ends with the tests.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

IMPORTED = "torch.utils.tensorboard lightning.pytorch.cli lightning transformers matplotlib.figure ftfy PIL".split()
# Variables that no import reads; where another differs from the server's, Python starts afresh.
READ_LATE = {"PYTHONPATH", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXIT_CODES"}
READ_LATE |= {"XDG_CACHE_HOME", "no_proxy", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "TRAIN_CLIP_STARTER"}
READ_LATE |= {"HOLD", "SLOW", "DIE"}  # of tests/search/test_embed.py
NUMBER = struct.Struct("q")
ENDS = 4  # file descriptors sent with a request: the three streams, and where the process's number and end are told

of_tests: dict[str, str] = {}  # all variables, before any test has set one


class Server(NamedTuple):
    """What the tests' process keeps of the server."""

    process: subprocess.Popen
    socket: socket.socket
    variables: dict[str, str]


class Process:
    """A process that the server has forked; what ``subprocess.Popen`` calls its members.

    Args:
        told: file descriptor from which the process's number comes, then its exit code.
    """

    def __init__(self, told: int) -> None:
        self.told = told
        self.pid = self._next()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus the signal's number where one ended it; None as long as it runs."""
        if self.returncode is None and select.select([self.told], [], [], 0)[0]:
            self.returncode = self._next()
            os.close(self.told)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code."""
        if self.returncode is None and not select.select([self.told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _next(self) -> int:
        told = os.read(self.told, NUMBER.size)
        assert told, "the server of forked processes has ended"
        return NUMBER.unpack(told)[0]


def start(
    words: Sequence[str],
    *,
    stdout: IO | int,
    stderr: IO | int,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Process | subprocess.Popen:
    """Start what ``python WORDS`` would: ``-m MODULE …``, ``-c CODE …`` or ``SCRIPT …``, with nothing to read.

    Args:
        words: what follows ``python``.
        stdout: a file or a file descriptor, for what it prints.
        stderr: the same.
        env: all its variables; None: those of this process.
        cwd: its folder; None: that of this process.
    """
    import torch

    variables = dict(os.environ if env is None else env)
    # A fork cannot use CUDA if an import has so much as counted the devices.
    if not hasattr(os, "fork") or torch.cuda.is_available() or _early(variables) != _early(_server().variables):
        streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
        return subprocess.Popen([sys.executable, *words], env=variables, cwd=cwd, start_new_session=True, **streams)
    reader, writer = os.pipe()
    request = json.dumps([list(words), variables, str(Path(cwd or ".").absolute())]).encode()
    with Path(os.devnull).open() as nothing:
        ends = [end if isinstance(end, int) else end.fileno() for end in (nothing, stdout, stderr, writer)]
        socket.send_fds(_server().socket, [NUMBER.pack(len(request)) + request], ends)
    os.close(writer)
    return Process(reader)


def run(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    processes: int = 1,
    check: bool = False,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run([sys.executable, *words], capture_output=True, text=True)``, by ``start``.

    With ``processes`` of 2 as two that train together: what both print, and a code other than 0 if either has one.
    """
    variables = dict(os.environ if env is None else env)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = [start(words, stdout=out, stderr=err, env=variables | rank, cwd=cwd) for rank in ranks(processes)]
        try:
            code = next(filter(None, [process.wait(timeout) for process in started]), 0)
        except subprocess.TimeoutExpired:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
            raise
        out.seek(0), err.seek(0)
        ended = subprocess.CompletedProcess(list(words), code, out.read(), err.read())
    if check:
        ended.check_returncode()
    return ended


def ranks(number: int) -> list[dict[str, str]]:
    """The variables of processes that train together, as Lightning sets them for those that it starts."""
    if number == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [both | {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)} for rank in range(number)]


def _early(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that an import may read."""
    return {name: value for name, value in variables.items() if name not in READ_LATE and "PYTEST" not in name}


@cache
def _server() -> Server:
    """This process's server, started at the first need."""
    ours, its = socket.socketpair()
    variables = {name: value for name, value in (of_tests or os.environ).items() if name not in READ_LATE}
    with its:
        program = [sys.executable, __file__, str(its.fileno())]
        # Pipes, as most of what it forks will have: Python looks once what its streams are. Ctrl-C is for the tests.
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(program, env=variables, pass_fds=[its.fileno()], start_new_session=True, **streams)
    return Server(process, ours, variables)


def _serve(connection: socket.socket) -> list[str]:
    """Fork a process for each request. Returns in those alone, with their words."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        head, ends, _, _ = socket.recv_fds(connection, NUMBER.size, ENDS)
        if not head:
            sys.exit()
        words, variables, folder = json.loads(connection.recv(NUMBER.unpack(head)[0], socket.MSG_WAITALL))
        if not os.fork():
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _fork_one(ends)
            os.environ.clear()
            os.environ.update(variables)
            os.chdir(folder)
            return words
        for end in ends:
            os.close(end)


def _fork_one(ends: list[int]) -> None:
    """Fork once more. Returns in the child; the parent only tells of it, and of its end."""
    *streams, told = ends
    if child := os.fork():
        for stream in (*streams, 0, 1, 2):
            os.close(stream)
        os.write(told, NUMBER.pack(child))
        os.write(told, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        os._exit(0)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for end in ends:
        os.close(end)


def _become(words: list[str]) -> None:
    """Run a program in this process, as ``python WORDS`` does."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(path).absolute()) for path in paths if path]
    # A fresh interpreter's generator has a seed of its own.
    sys.modules["numpy"].random.seed()
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).absolute().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    # This file's folder, in which its program need not be.
    sys.path.pop(0)
    for name in IMPORTED:
        __import__(name)
    sys.modules["matplotlib.figure"].Figure.savefig = lambda self, file, **how: Path(file).touch()
    # What the imports have made is no garbage: a child that looked through it would copy it, page by page.
    gc.freeze()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
