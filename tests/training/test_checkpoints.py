"""When a run is saved, what is kept of it, and under which names."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from train_clip.errors import UserError
from train_clip.training import checkpoints as module
from train_clip.training.checkpoints import BY_RECALL, AtomicCheckpointIO, Checkpoints, Interval
from train_clip.training.ema import ema_figure


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [
        ("500", 500, 0), ("1 step", 1, 0), ("20 steps", 20, 0),
        ("10m", 0, 600), ("10 min", 0, 600), ("0.5m", 0, 30), ("1 minute", 0, 60), ("90minutes", 0, 5400),
    ],
)  # fmt: skip
def test_an_interval_is_steps_or_minutes(text: str, steps: int, seconds: float) -> None:
    """What people write, against seconds worked out by hand."""
    assert Interval.parse(text) == Interval(steps, seconds)


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "10h", "30s", "often", "", "m", "0m"])
def test_other_intervals_are_refused(text: str) -> None:
    """Word for word."""
    with pytest.raises(UserError) as caught:
        Interval.parse(text)
    assert str(caught.value) == f"--save_every {text}: expected optimizer steps, such as 500, or minutes, such as 10m."


LAST = 9  # place of an epoch's last batch


class Run:
    """What ``Checkpoints`` asks of a Trainer, step by step under the test's control."""

    def __init__(self, folder: Path, every: Interval | None = None, keep: int = 2) -> None:
        self.folder = folder / "checkpoints"
        self.saving = Checkpoints(self.folder, every, keep)
        self.trainer: Any = SimpleNamespace(
            global_step=0, is_global_zero=True, fast_dev_run=0, is_last_batch=False, num_training_batches=10,
            accumulate_grad_batches=1, should_stop=False, max_steps=-1, sanity_checking=False,
            callback_metrics={}, loggers=[], lightning_module=None,
            state=SimpleNamespace(fn=TrainerFn.FITTING), strategy=SimpleNamespace(barrier=lambda: None),
            save_checkpoint=self._save, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=0)),
            _logger_connector=SimpleNamespace(update_train_step_metrics=lambda: None),
        )  # fmt: skip
        self.saves = 0
        self.saving.setup(self.trainer, None, "fit")  # type: ignore[arg-type]
        self.saving.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def _save(self, path: Path, weights_only: bool) -> None:
        assert not weights_only
        self.saves += 1
        AtomicCheckpointIO().save_checkpoint({"step": self.trainer.global_step, "of": self.saving.state_dict()}, path)

    def step(self, batch: int = 0) -> None:
        self.trainer.global_step += 1
        self.batch_ends(batch)

    def batch_ends(self, batch: int) -> None:
        self.trainer.fit_loop.epoch_loop.batch_idx = batch
        self.saving.on_train_batch_end(self.trainer, None, None, None, batch)

    def validated(self, value: float, mean: float = 0.0) -> None:
        figures = {BY_RECALL: torch.tensor(value), ema_figure(BY_RECALL): torch.tensor(mean)}
        self.trainer.callback_metrics = figures
        self.saving.on_validation_end(self.trainer, None)  # type: ignore[arg-type]

    def epoch_ends(self) -> None:
        self.saving.on_train_epoch_end(self.trainer, None)  # type: ignore[arg-type]

    def states(self) -> dict[str, int]:
        """Each file's name and the step that it holds."""
        return {file.name: torch.load(file, weights_only=True)["step"] for file in sorted(self.folder.iterdir())}


def test_every_few_steps(tmp_path: Path) -> None:
    """Every 3 of 10 steps: the two newest are kept, and last.ckpt is the newest by another name, not a copy."""
    run = Run(tmp_path, Interval(steps=3))
    for _ in range(10):
        run.step()
    assert run.saves == 3
    assert run.states() == {"last.ckpt": 9, "step-00000006.ckpt": 6, "step-00000009.ckpt": 9}
    assert (run.folder / "last.ckpt").samefile(run.folder / "step-00000009.ckpt")


def test_every_few_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 2 minutes on a clock that goes on by 50 s a step: after 150 s and again; an epoch's end counts."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    run = Run(tmp_path, Interval(seconds=120))
    for batch in (0, 0, 0, 0, 0, 0, LAST):
        clock[0] += 50
        run.step(batch)
    assert run.states() == {"last.ckpt": 6, "step-00000003.ckpt": 3, "step-00000006.ckpt": 6}
    run.epoch_ends()
    for _ in range(2):
        clock[0] += 50
        run.step()
    assert run.states()["last.ckpt"] == 7


def test_no_save_while_a_gradient_is_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulation of 3: the interval is over after each batch, and only the third of them saves."""
    monkeypatch.setattr(module.time, "monotonic", iter(range(0, 10**6, 1000)).__next__)
    run = Run(tmp_path, Interval(seconds=1))
    run.trainer.accumulate_grad_batches = 3
    saves = []
    for batch in range(6):
        run.batch_ends(batch)
        saves.append(run.saves)
    assert saves == [0, 0, 1, 1, 1, 2]


def test_the_end_of_an_epoch_is_saved_once(tmp_path: Path) -> None:
    """Its last batch is a due step, its validation the best so far: one file, written at the epoch's end."""
    run = Run(tmp_path, Interval(steps=1))
    run.step(LAST)
    run.validated(0.5)
    assert run.saves == 0
    run.epoch_ends()
    assert run.saves == 1
    assert run.states() == {"best.ckpt": 1, "last.ckpt": 1, "step-00000001.ckpt": 1}


def test_the_best_is_kept_by_its_figure(tmp_path: Path) -> None:
    """Recalls 0.2, 0.4, 0.3, NaN, 0.4 after five epochs: best.ckpt is the second, though its number is long gone."""
    run = Run(tmp_path)
    for value in (0.2, 0.4, 0.3, float("nan"), 0.4):
        run.step(LAST)
        run.validated(value)
        run.epoch_ends()
    assert run.states() == {"best.ckpt": 2, "last.ckpt": 5, "step-00000004.ckpt": 4, "step-00000005.ckpt": 5}


def test_a_first_figure_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    """NaN, then 0.2: nothing is above NaN, so that it would stand for ever."""
    run = Run(tmp_path)
    for value in (float("nan"), 0.2):
        run.step(LAST)
        run.validated(value)
        run.epoch_ends()
    assert run.states() == {"best.ckpt": 2, "last.ckpt": 2, "step-00000001.ckpt": 1, "step-00000002.ckpt": 2}


def test_the_best_within_an_epoch_is_saved_there(tmp_path: Path) -> None:
    """The weights that were scored are those that are kept, not those at the epoch's end."""
    run = Run(tmp_path)
    run.step()
    run.validated(0.4)
    run.step(LAST)
    run.epoch_ends()
    assert run.states() == {"best.ckpt": 1, "last.ckpt": 2, "step-00000001.ckpt": 1, "step-00000002.ckpt": 2}


def test_the_best_mean_within_an_epoch_is_saved_there(tmp_path: Path) -> None:
    """Also where the weights that are trained were better before."""
    run = Run(tmp_path)
    for value, mean, saves in ((0.4, 0.3, 1), (0.3, 0.35, 2), (0.2, 0.35, 2)):
        run.step()
        run.validated(value, mean)
        assert run.saves == saves
    assert run.states()["best.ckpt"] == 1
    assert run.saving.best["best_mean"] == pytest.approx(0.35)


def test_a_resumed_run_remembers_its_best(tmp_path: Path) -> None:
    """0.4 before, 0.3 after: best.ckpt stays."""
    run = Run(tmp_path)
    run.step(LAST)
    run.validated(0.4)
    run.epoch_ends()
    state = torch.load(run.folder / "last.ckpt", weights_only=True)["of"]
    again = Run(tmp_path)
    again.saving.load_state_dict(state)
    again.trainer.global_step = 1
    again.step(LAST)
    again.validated(0.3)
    again.epoch_ends()
    assert again.states()["best.ckpt"] == 1


def test_later_states_of_an_abandoned_course_stay(tmp_path: Path) -> None:
    """Resumed from step 2 where 8 and 9 exist: they are neither counted nor deleted; what is newest is last.ckpt."""
    run = Run(tmp_path, Interval(steps=1))
    for _ in range(9):
        run.step()
    again = Run(tmp_path, Interval(steps=1))
    again.trainer.global_step = 2
    for _ in range(3):
        again.step()
    assert again.states() == {
        "last.ckpt": 5, "step-00000004.ckpt": 4, "step-00000005.ckpt": 5, "step-00000008.ckpt": 8,
        "step-00000009.ckpt": 9,
    }  # fmt: skip


def test_the_older_one_goes_only_when_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second save fails with keep=1: the first is still there, by both names; a third that works replaces it."""
    run = Run(tmp_path, Interval(steps=1), keep=1)
    run.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _full)
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written .*No space left on device"):
            run.step()
    assert run.states() == {"last.ckpt": 1, "step-00000001.ckpt": 1}
    run.step()
    assert run.states() == {"last.ckpt": 3, "step-00000003.ckpt": 3}


def test_the_older_one_stays_until_the_new_one_has_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keep=1 the second state is whole, and cannot be called by its step: the first is still there."""
    run = Run(tmp_path, Interval(steps=1), keep=1)
    run.step()
    monkeypatch.setattr(module.files, "link", _full)
    with pytest.raises(UserError, match=r"No space left on device\. .*last\.ckpt is complete\."):
        run.step()
    assert run.states() == {"last.ckpt": 2, "step-00000001.ckpt": 1}


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_name_that_cannot_be_given_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full once last.ckpt is whole: an error that all processes stop with, and last.ckpt loads."""
    run = Run(tmp_path, Interval(steps=1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "step-00000001.ckpt")

    monkeypatch.setattr(module.files, "link", full)
    with pytest.raises(UserError, match=r"step-00000001\.ckpt: No space left on device\. .*last\.ckpt is complete\."):
        run.step()
    assert run.states() == {"last.ckpt": 1}


def test_files_of_the_users_own_stay(tmp_path: Path) -> None:
    """A copy under another name, which the newest few do not count."""
    run = Run(tmp_path, Interval(steps=1), keep=1)
    run.step()
    (run.folder / "last.ckpt").rename(run.folder / "step-00000001-good.ckpt")
    run.step()
    assert run.states() == {"last.ckpt": 2, "step-00000001-good.ckpt": 1, "step-00000002.ckpt": 2}


@pytest.mark.parametrize("why", ["should_stop", "max_steps"])
def test_a_run_that_ends_within_an_epoch_is_saved_there(tmp_path: Path, why: str) -> None:
    """Early stopping, or the last of --max_steps: saved after that batch, not at Lightning's end."""
    run = Run(tmp_path)
    run.step()
    assert run.saves == 0
    setattr(run.trainer, why, 2 if why == "max_steps" else True)
    run.step()
    run.epoch_ends()
    assert run.saves == 1
    assert run.states() == {"last.ckpt": 2, "step-00000002.ckpt": 2}


def test_a_validation_while_a_gradient_is_pending_is_not_asked_for_the_best(tmp_path: Path) -> None:
    """No state can hold that gradient: nothing is saved, and a warning says which option to change."""
    run = Run(tmp_path)
    run.trainer.accumulate_grad_batches = 3
    run.batch_ends(1)
    with pytest.warns(UserWarning, match="Make --val_check_interval a multiple of --accumulate_grad_batches"):
        run.validated(0.9)
    assert (run.saves, run.saving.best["best"]) == (0, None)


def test_a_validation_while_a_gradient_is_pending_says_nothing_of_a_best_by_other_data(tmp_path: Path) -> None:
    """Whose figure is still among the Trainer's, and was taken note of when it came."""
    run = Run(tmp_path)
    run.trainer.accumulate_grad_batches, run.saving.best_by = 3, "more/top1"
    run.batch_ends(1)
    run.trainer.callback_metrics = {"more/top1": torch.tensor(0.9)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.saving.on_validation_end(run.trainer, None)  # type: ignore[arg-type]
    assert run.saves == 0


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no hard links the names are copies."""

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run = Run(tmp_path, Interval(steps=1))
    run.step()
    assert run.states() == {"last.ckpt": 1, "step-00000001.ckpt": 1}
    assert not (run.folder / "last.ckpt").samefile(run.folder / "step-00000001.ckpt")


def test_what_a_crash_left_is_swept(tmp_path: Path) -> None:
    """Temporary files go at the start; checkpoints and a user's own files stay."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt.tmp-123", "step-00000005.ckpt.tmp-99", "mine.ckpt", "notes.txt"):
        (folder / name).write_bytes(b"")
    Run(tmp_path)
    assert {file.name for file in folder.iterdir()} == {"mine.ckpt", "notes.txt"}


@pytest.mark.parametrize("what", ["sanity", "validate", "trial"])
def test_nothing_is_saved_where_nothing_is_trained(tmp_path: Path, what: str) -> None:
    """Lightning's trial validation, ``trainer.validate`` and ``fast_dev_run`` leave no file."""
    run = Run(tmp_path)
    run.trainer.sanity_checking = what == "sanity"
    run.trainer.state.fn = TrainerFn.VALIDATING if what == "validate" else TrainerFn.FITTING
    run.trainer.fast_dev_run = int(what == "trial")
    run.validated(0.4)
    if what == "trial":
        run.epoch_ends()
    assert not run.folder.exists()
