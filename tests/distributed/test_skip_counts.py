"""The report of bad files on two gloo processes, against what one process would say of both one's batches: by hand."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from two_processes import run

from train_clip.data.samples import Batch, Skip
from train_clip.gather import world
from train_clip.training.skips import SkipReport

FOLDER = Path("two_epochs")


def two_epochs() -> dict[str, Any]:
    """Each process meets a file of its own and one of both; in the next epoch the second alone meets another."""
    own, rank, module = SkipReport(), world()[0], SimpleNamespace(tokenizer=SimpleNamespace(context_length=77))
    trainer = SimpleNamespace(log_dir=str(FOLDER), is_global_zero=rank == 0, current_epoch=0)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        own.setup(trainer, module, "fit")  # type: ignore[arg-type]
        for trainer.current_epoch, batch in enumerate(
            (batch_of(("both",), (f"own {rank}", "both"), num_cut=rank), batch_of(*[("late",)] * rank))
        ):
            own.on_train_batch_end(trainer, module, None, batch, 0)  # type: ignore[arg-type]
            own.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
    return {"screen": screen.getvalue().splitlines()}


def batch_of(*replaced: tuple[str, ...], num_cut: int = 0) -> Batch:
    """Four pairs; for each replaced one, the files that were bad."""
    skips = tuple(tuple(Skip(path, "bad") for path in paths) for paths in replaced)
    return Batch(torch.zeros(4, 3, 2, 2), torch.zeros(4, 2), skips, num_cut)


def test_two_processes_report_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes' samples and captions in one line, each file named once, by the first process alone: by hand."""
    monkeypatch.chdir(tmp_path)
    first, second = (result["screen"] for result in run(two_epochs, tmp_path))
    assert second == []
    log = FOLDER / "skipped.tsv"
    assert first == [
        "Skipped both: bad.",
        "Skipped own 0: bad.",
        "Skipped own 1: bad.",
        f"Epoch 1: 4 samples replaced by others or skipped. Bad files so far: 3 (3 × bad); their names are in {log}.",
        "Epoch 1: 1 of 8 captions were longer than 77 tokens and were truncated, keeping the end token.",
        "Skipped late: bad.",
        f"Epoch 2: 1 samples replaced by others or skipped. Bad files so far: 4 (4 × bad); their names are in {log}.",
    ]
    assert log.read_text(encoding="utf-8").splitlines() == ["both\tbad", "own 0\tbad", "own 1\tbad", "late\tbad"]
