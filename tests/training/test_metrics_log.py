"""``metrics.csv`` of a run: one header, all columns, each row once, whatever interrupted it."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from train_clip.errors import UserError
from train_clip.training.display import MetricsLog, read_metrics


def rows(log: MetricsLog) -> list[dict[str, str]]:
    with log.file.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_columns_join_later(tmp_path: Path) -> None:
    """Three rows of other figures: one header line, empty cells where a row has none; each at once on disk."""
    log = MetricsLog(tmp_path, 0)
    for step, figures in enumerate(({"b": 0.5}, {"b": 0.25, "a": 1.0}, {"c": 2})):
        log.log_metrics(figures, step)
        assert len(rows(log)) == step + 1
    assert log.file == tmp_path / "logs" / "metrics.csv"
    assert log.file.read_bytes() == b"a,b,c,step\r\n,0.5,,0\r\n1.0,0.25,,1\r\n,,2,2\r\n"


def test_a_row_that_was_written_ahead_of_its_time_comes_once(tmp_path: Path) -> None:
    """The same figures of the same step; others of that step are a row of their own."""
    log = MetricsLog(tmp_path, 0)
    for figures, step in (({"a": 1}, 3), ({"a": 1}, 3), ({"b": 2}, 3), ({"a": 1}, 4)):
        log.log_metrics(figures, step)
    assert [(row["step"], row["a"], row["b"]) for row in rows(log)] == [("3", "1", ""), ("3", "", "2"), ("4", "1", "")]


@pytest.mark.parametrize("cut", [2, 3, 5])
def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path, cut: int) -> None:
    """Resumed from step 2 of 4, the last row torn by the crash: rows 0 and 1, then those that come again, in order."""
    log = MetricsLog(tmp_path, 0)
    for step in range(4):
        log.log_metrics({"a": step, "z": 0.125}, step)
    log.file.write_bytes(log.file.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(log.file)] == ["0", "1", "2"]
    (tmp_path / "logs" / "metrics.csv.tmp-123").touch()  # of a run that was killed
    again = MetricsLog(tmp_path, 2)
    for step in (2, 3):
        again.log_metrics({"a": 10 + step, "new": 1}, step)
    assert [(row["step"], row["a"], row["z"]) for row in rows(again)] == [
        ("0", "0", "0.125"), ("1", "1", "0.125"), ("2", "12", ""), ("3", "13", ""),
    ]  # fmt: skip
    assert list((tmp_path / "logs").iterdir()) == [again.file]


def test_rows_that_came_again_stay_when_a_column_joins(tmp_path: Path) -> None:
    """Lost rows are dropped once: a validation's new column leaves those of the resumed run where they are."""
    log = MetricsLog(tmp_path, 0)
    for step in range(3):
        log.log_metrics({"a": step}, step)
    again = MetricsLog(tmp_path, 1)
    for step, figures in ((1, {"a": 11}), (2, {"a": 12}), (2, {"val": 5})):
        again.log_metrics(figures, step)
    assert [(row["step"], row["a"], row["val"]) for row in rows(again)] == [
        ("0", "0", ""), ("1", "11", ""), ("2", "12", ""), ("2", "", "5"),
    ]  # fmt: skip


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a row is added and while the file is written anew: the file and the reason; what was there stays."""
    log = MetricsLog(tmp_path, 0)
    log.log_metrics({"a": 1}, 0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    for figures in ({"a": 2}, {"b": 2}):
        with pytest.raises(
            UserError, match=r"metrics\.csv: cannot be written \(No space left on device\)\. Free some space"
        ):
            log.log_metrics(figures, 1)
    monkeypatch.undo()
    assert [row["step"] for row in rows(log)] == ["0"]
