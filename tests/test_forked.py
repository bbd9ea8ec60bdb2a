"""Processes forked for tests against those that Python starts afresh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

PROGRAM = """
import atexit, json, os, signal, sys, threading
seen = [sys.argv, __name__, __spec__ and __spec__.name, sys.modules["__main__"].__dict__ is globals(), os.getcwd()]
seen += [sys.path, dict(os.environ), [str(signal.getsignal(number)) for number in signal.valid_signals()]]
seen += [sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0, threading.active_count()]
seen += [os.getsid(0) == os.getpid(), sys.stdin.read(), "train_clip" in sys.modules]
print(json.dumps(seen))
atexit.register(print, "the end")
print("in vain", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_a_forked_process_sees_what_a_fresh_one_does(how, tmp_path):
    """Words, ``__main__``, folder, path, variables, handlers, open files, session, streams, and how it ends."""
    (tmp_path / "seen.py").write_text(PROGRAM)
    words = {"-c": ["-c", PROGRAM], "-m": ["-m", "seen"], "script": ["seen.py"]}[how]
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": os.pathsep.join(["a", "b"]), "LOCAL_RANK": "3"}}
    fresh = subprocess.run(
        [sys.executable, *words, "x"], stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True,
        **where,
    )  # fmt: skip
    ended = forked.run([*words, "x"], **where)
    assert json.loads(ended.stdout.splitlines()[0]) == json.loads(fresh.stdout.splitlines()[0])
    assert ended.stdout.splitlines()[1:] == fresh.stdout.splitlines()[1:] == ["the end"]
    assert (ended.returncode, ended.stderr) == (fresh.returncode, fresh.stderr) == (7, "in vain\n")


def test_signals_and_ends_are_told(tmp_path):
    """It lives, it dies of the signal that it gets; where a variable differs that imports read, it starts afresh."""
    with Path(os.devnull).open("w") as nothing:
        process = forked.start(["-c", "import time; time.sleep(99)"], stdout=nothing, stderr=nothing)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.terminate()
        assert process.wait(60) == process.poll() == -signal.SIGTERM
        other = os.environ | {"OMP_NUM_THREADS": "7"}
        afresh = forked.start(["-c", "import sys; sys.exit(3)"], stdout=nothing, stderr=nothing, env=other)
        assert isinstance(afresh, subprocess.Popen)
        assert afresh.wait(60) == 3
