"""How many threads and loader processes there are where nobody says: affinity, CPU quota, others' load, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train_clip import cores

Machine = Callable[..., dict[str, int]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of 64 cores with these control groups, whose process has none of OpenMP's variables."""
    (tmp_path / "groups").mkdir()
    (tmp_path / "stat").write_text("cpu 0\n")
    for name, file in {"CGROUPS": "groups", "OWN_CGROUPS": "own", "TICKS": "stat"}.items():
        monkeypatch.setattr(cores, name, tmp_path / file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "_busy", 0.0)
    monkeypatch.setattr(cores, "_chosen", False)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    monkeypatch.setattr(os, "environ", environment)
    threads: dict[str, int] = {}
    torch = SimpleNamespace(set_num_threads=lambda number: threads.update(torch=number))

    def start(own: str = "", limits: dict[str, str] | None = None, busy: float = 0.0, modules: Any = ()) -> dict:
        """Write the files, and import a PyTorch while others keep cores busy; what was set of its threads."""
        (tmp_path / "own").write_text(own)
        for name, limit in (limits or {}).items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(f"{limit}\n")
        loaded = dict.fromkeys(modules, torch)
        monkeypatch.setattr(cores, "sys", SimpleNamespace(modules=loaded))
        monkeypatch.setattr(cores, "process_time", iter((0.5, 1.5, 2.5)).__next__)
        ticks(tmp_path / "stat", 1000, 1000)
        with cores.fitting_threads():
            loaded["torch"] = torch
            # Two seconds, in which this process has worked for one on one core.
            ticks(tmp_path / "stat", 1000 + int(200 * (busy + 0.5) / 64), 1200)
        return threads

    return start


def ticks(file: Path, busy: int, total: int) -> None:
    each = f"{busy} 0 0 {total - busy} 0 0 0 0 0 0"
    file.write_text(f"cpu {each}\n" + "".join(f"cpu{core} {each}\n" for core in range(64)) + "intr 1\n")


V1 = "4:memory:/a\n2:cpu,cpuacct:/docker/a\n0::/docker/a\n"


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("", {}, 64),  # not Linux
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),  # docker run --cpus 2
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "400000 100000"}, 3),
        ("0::/a\n", {"a/b/cpu.max": "300000 100000", "c/cpu.max": "100000 100000"}, 64),  # of others
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "400000", "cpu/docker/a/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu/cpu.cfs_quota_us": "500000", "cpu/cpu.cfs_period_us": "100000"}, 5),  # the container's own mount
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "-1", "cpu/docker/a/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_the_quota_of_a_container(machine: Machine, own: str, limits: dict[str, str], expected: int) -> None:
    """Threads and loader processes are as many as the control groups, of either version, have the time of."""
    assert machine(own, limits) == {"torch": expected}
    assert cores.free_cores() == expected
    assert os.environ["OMP_NUM_THREADS"] == str(expected)
    assert cores.say_load() == ""


def test_the_affinity(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores of a large machine are two; where a system has no affinity, all are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert machine() == {"torch": 2}
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores.free_cores() == 12


@pytest.mark.parametrize(("busy", "expected"), [(0.0, 64), (1.0, 63), (60.0, 4), (64.0, 1)])
def test_what_others_keep_busy(machine: Machine, busy: float, expected: int) -> None:
    """It is left to them, this process's own work aside; within a quota it makes no difference while cores are free."""
    assert machine(busy=busy)["torch"] == pytest.approx(expected, abs=1)
    assert ("Other processes keep" in cores.say_load()) == (busy > 0)
    del os.environ["OMP_NUM_THREADS"]
    assert machine("0::/\n", {"cpu.max": "200000 100000"}, busy)["torch"] == (2 if busy < 62 else 1)


def test_processes_that_train_together(machine: Machine) -> None:
    """They share the cores, and do not take each other for load; the processes that one starts inherit its number."""
    machine()
    cores.share_threads(4)
    assert os.environ["OMP_NUM_THREADS"] == "16"
    assert machine(busy=3.0, modules=[])["torch"] == 16  # as a child, which the variable tells
    del os.environ["OMP_NUM_THREADS"]
    machine(busy=3.0)
    cores.share_threads(4)
    assert os.environ["OMP_NUM_THREADS"] == "16"
    cores.share_threads(1000)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_what_the_user_has_set_wins(machine: Machine) -> None:
    """OMP_NUM_THREADS, for all processes that train together; and each of the waiting policies."""
    os.environ["OMP_NUM_THREADS"] = "7"
    assert machine("0::/\n", {"cpu.max": "200000 100000"}, 50.0) == {}
    cores.share_threads(2)
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ["GOMP_SPINCOUNT"]
    assert cores.say_load() == ""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        for other in cores.WAITING:
            os.environ.pop(other, None)
        os.environ[name] = "1"
        machine()
        assert {"OMP_WAIT_POLICY", *cores.WAITING} & os.environ.keys() == {name}
        del os.environ[name]


def test_a_pytorch_that_is_there_already_is_left_alone(machine: Machine) -> None:
    """A verb that is called from Python changes nothing of its process."""
    before = dict(os.environ)
    assert machine("0::/\n", {"cpu.max": "200000 100000"}, modules=["torch"]) == {}
    cores.share_threads(2)
    assert before == os.environ


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(
    ("given", "expected"), [({}, ["1", "1", "True"]), ({"OMP_NUM_THREADS": "2"}, ["2", "2", "True"])]
)
def test_a_command(given: dict[str, str], expected: list[str]) -> None:
    """In a process of its own that may use one core: PyTorch's threads, the variable for others, and the waiting."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from train_clip import cli; "
        "cli.main(['models', '--show', 'RN50']); import torch; "
        "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], 'GOMP_SPINCOUNT' in os.environ)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    ended = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1].split() == expected
