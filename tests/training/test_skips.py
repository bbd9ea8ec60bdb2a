"""The report of bad files and cut captions: what it says of batches put together by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train_clip.data.samples import Batch, Skip
from train_clip.training.skips import NAMED_AT_ONCE, SkipReport

MODULE = SimpleNamespace(tokenizer=SimpleNamespace(context_length=77))


def batch(*replaced: tuple[str, ...], num_cut: int = 0) -> Batch:
    """Four pairs; for each replaced one, the files that were bad."""
    skips = tuple(tuple(Skip(path, "bad") for path in paths) for paths in replaced)
    return Batch(torch.zeros(4, 3, 2, 2), torch.zeros(4, 2), skips, num_cut)


def trainer(folder: Path, **how: Any) -> Any:
    """What the report asks of a Trainer."""
    state = {"log_dir": None, "default_root_dir": str(folder), "sanity_checking": False, "current_epoch": 0}
    state |= {"is_global_zero": True, "accumulate_grad_batches": 1, "is_last_batch": False, "num_training_batches": 99}
    epoch_loop = SimpleNamespace(batch_idx=9)
    return SimpleNamespace(**(state | how), fit_loop=SimpleNamespace(epoch_loop=epoch_loop))


def report(folder: Path) -> SkipReport:
    made = SkipReport()
    made.setup(trainer(folder), MODULE, "fit")  # type: ignore[arg-type]
    return made


def log(folder: Path) -> list[str]:
    file = folder / "skipped.tsv"
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def test_where_nothing_is_bad_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole batches, and another kind of batch: no line, no log."""
    own = report(tmp_path)
    for whole in (batch(), (torch.zeros(4, 3, 2, 2), ["a"] * 4)):
        own.on_train_batch_end(trainer(tmp_path), MODULE, None, whole, 0)
        own.on_validation_batch_end(trainer(tmp_path), MODULE, None, whole, 0)
    own.on_train_epoch_end(trainer(tmp_path), MODULE)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_samples_are_counted_by_epoch_and_files_by_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three samples and three files, one sample of a known file, one of another file, none: two lines, by hand."""
    own = report(tmp_path)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch(("a",), ("b", "a")), 0)
    own.on_validation_batch_end(trainer(tmp_path), MODULE, None, batch(("c",)), 0)
    own.on_train_epoch_end(trainer(tmp_path), MODULE)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch(("a",)), 0)
    own.on_train_epoch_end(trainer(tmp_path, current_epoch=1), MODULE)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch(("d",), ("a",)), 0)
    own.on_train_epoch_end(trainer(tmp_path, current_epoch=2), MODULE)
    own.on_train_epoch_end(trainer(tmp_path, current_epoch=3), MODULE)
    place = tmp_path / "skipped.tsv"
    assert capsys.readouterr().out.splitlines() == [
        *(f"Skipped {name}: bad." for name in "abc"),
        f"Epoch 1: 3 samples replaced by others or skipped. Bad files so far: 3 (3 × bad); their names are in {place}.",
        "Skipped d: bad.",
        f"Epoch 3: 2 samples replaced by others or skipped. Bad files so far: 4 (4 × bad); their names are in {place}.",
    ]
    assert log(tmp_path) == ["a\tbad", "b\tbad", "c\tbad", "d\tbad"]


def test_the_trial_run_of_validation_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches that Lightning reads before training: neither named nor counted."""
    own = report(tmp_path)
    own.on_validation_batch_end(trainer(tmp_path, sanity_checking=True), MODULE, None, batch(("a",), num_cut=2), 0)
    own.on_train_epoch_end(trainer(tmp_path), MODULE)
    assert capsys.readouterr().out == ""
    assert log(tmp_path) == []


def test_the_screen_names_the_first_few_and_the_log_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve bad files: five lines on the screen, twelve in the log, beside the logs where there is a logger."""
    own = SkipReport()
    own.setup(trainer(tmp_path, log_dir=str(tmp_path / "logs")), MODULE, "fit")  # type: ignore[arg-type]
    for index in range(12):
        own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch((f"{index:02}.png",)), index)
    assert NAMED_AT_ONCE == 5
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [f"{i:02}.png:" for i in range(5)]
    assert log(tmp_path / "logs") == [f"{index:02}.png\tbad" for index in range(12)]


@pytest.mark.parametrize(
    ("path", "shown"),
    [("b\udce4r.jpg", r"b\xe4r.jpg"), ("ein Bär 猫.jpg", "ein Bär 猫.jpg"), ("a\tb\nc\rd", r"a\tb\nc\rd")],
)
def test_a_path_is_one_field_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, shown: str
) -> None:
    """Bytes that are not UTF-8, tabs and line breaks are escaped, on the screen and in the log; nothing else is."""
    own = report(tmp_path)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch((path,)), 0)
    assert log(tmp_path) == [f"{shown}\tbad"]
    assert capsys.readouterr().out == f"Skipped {shown}: bad.\n"


def test_cut_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of twelve captions, over training and validation, in a line word for word; later ones are no news."""
    own = report(tmp_path)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch(num_cut=2), 0)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch(), 1)
    own.on_validation_batch_end(trainer(tmp_path), MODULE, None, batch(num_cut=1), 0)
    own.on_train_epoch_end(trainer(tmp_path), MODULE)
    own.on_train_batch_end(trainer(tmp_path), MODULE, None, batch(num_cut=2), 0)
    own.on_train_epoch_end(trainer(tmp_path, current_epoch=1), MODULE)
    assert capsys.readouterr().out == (
        "Epoch 1: 3 of 12 captions were longer than 77 tokens and were truncated, keeping the end token.\n"
    )
