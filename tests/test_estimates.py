"""What long work says it will take: words, exactly; estimates on a clock of the test's; room on a disk that is full."""

from __future__ import annotations

import io
import re
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader

from tests.commands.test_train import arguments, model_file  # noqa: F401
from tests.conftest import TINY, write_pairs
from tests.training.tiny_encoders import SIDE, bare_trainer, bert, image_tower, tokenizer
from train_clip import CLIPWrapper, CustomCLIPWrapper, PromptCLIPWrapper, cli, estimates
from train_clip.commands import progress
from train_clip.commands.convert import write_model
from train_clip.commands.run import checkpoint_sizes
from train_clip.data_tools.npz import NpzOptions, data_npz
from train_clip.errors import UserError
from train_clip.models.config import config_from_dict
from train_clip.prompts.file import PromptConfig
from train_clip.training.checkpoints import Checkpoints
from train_clip.training.display import RunProgress

NOON = datetime(2026, 11, 30, 12, 0)
END = r"done at about \d\d:\d\d( \(\d{4}-\d\d-\d\d\))?"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 0 s, done at about 12:00"),
        (45, "about 45 s, done at about 12:00"),
        (99.6, "about 100 s, done at about 12:01"),
        (100, "about 2 min, done at about 12:01"),
        (24 * 60, "about 24 min, done at about 12:24"),
        (59.6 * 60, "about 1 h 0 min, done at about 12:59"),
        (84 * 60, "about 1 h 24 min, done at about 13:24"),
        (12 * 3600 - 1, "about 12 h 0 min, done at about 23:59"),
        (12 * 3600, "about 12 h 0 min, done at about 00:00 (2026-12-01)"),
        (47.4 * 3600, "about 47 h 24 min, done at about 11:24 (2026-12-02)"),
        (47.9 * 3600, "about 2 d 0 h, done at about 11:54 (2026-12-02)"),
        (76.4 * 3600, "about 3 d 4 h, done at about 16:24 (2026-12-03)"),
    ],
)
def test_time_in_words(seconds: float, text: str) -> None:
    """From noon on, by hand: each unit, what rounds into the next, and other days."""
    assert estimates.remaining(seconds, NOON) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 kB"),
        (12_400, "12 kB"),
        (1e6, "1 MB"),
        (345_400_000, "345 MB"),
        (1.24e9, "1.2 GB"),
        (2.5e12, "2,500.0 GB"),
    ],
)
def test_sizes_in_words(number: float, text: str) -> None:
    """Powers of ten."""
    assert estimates.size(number) == text


def fill_disk(monkeypatch: pytest.MonkeyPatch, free: float, total: float = 1e12) -> list[Path]:
    """Let every disk have so many bytes free; the folders that were asked for."""
    asked: list[Path] = []

    def disk_usage(place: Path) -> Any:
        asked.append(place)
        return SimpleNamespace(total=total, free=free)

    monkeypatch.setattr(estimates.shutil, "disk_usage", disk_usage)
    return asked


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the nearest folder that is there, also from a relative path; what fits just so fits."""
    monkeypatch.chdir(tmp_path)
    asked = fill_disk(monkeypatch, 2e9)
    assert estimates.require_room(tmp_path / "new" / "run", 2e9, "it takes") == 2e9
    assert estimates.require_room(Path("new", "run"), 1, "it takes") == 2e9
    assert asked == [tmp_path, tmp_path]
    with pytest.raises(UserError) as caught:
        estimates.require_room(Path("run"), 3.5e9, "checkpoints take at least")
    assert str(caught.value) == (
        "run: 2.0 GB of disk space are free. Expected room for 3.5 GB, which checkpoints take at least. Free space, or "
        "write to another disk."
    )
    fill_disk(monkeypatch, 0, total=0)
    assert estimates.require_room(tmp_path, 1e15, "it takes") == float("inf")


class Clock:
    """Seconds that go on when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def go_through(number: int, first: float, each: float) -> None:
    """Scan so many things in batches of 16, of which the first batch takes ``first`` seconds, the others ``each``."""
    clock = Clock()
    loader: Any = DataLoader(range(number), batch_size=16)  # type: ignore[arg-type]
    seen = 0
    for batch in progress.with_progress(loader, "images", clock):
        seen += len(batch)
        clock.now += first if seen == len(batch) else each
    assert seen == number


def test_a_scan_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of 2 s, the first of 100: after 3 of them 6 s / 48 images · the rest; then 15 s later and more."""
    go_through(1000, 100, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [
        "64 of 1,000 images, 8.0/s",
        "192 of 1,000 images, 8.0/s",
        "320 of 1,000 images, 8.0/s",
    ]
    # 936, 808, 680 images at 8 a second.
    for line, left in zip(lines, ("2 min", "2 min", "85 s"), strict=False):
        assert re.fullmatch(rf".*: about {left}, {END}", line)


def test_a_short_scan_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Done within five seconds; and soon done when these are over."""
    go_through(160, 1, 0.4)
    go_through(160, 1, 0.7)
    go_through(10, 100, 1)
    assert capsys.readouterr().out == ""


def test_a_scan_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with the time that is left and when it is done."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    go_through(100, 1, 2)
    assert re.search(rf"images .* about \d+ s, {END}", screen.getvalue())


class Training:
    """What ``RunProgress`` asks of a Trainer: batches of 1 s, the first of 60; two to a step, 40 to an epoch."""

    def __init__(self, capsys: pytest.CaptureFixture[str], batches_before: int = 0, **how: Any) -> None:
        self.clock, self.capsys = Clock(), capsys
        self.display = RunProgress(self.clock)
        self.display.last_shown = float("inf")  # no figures
        loop = SimpleNamespace(batch_idx=-1)
        usual = {
            "num_training_batches": 40, "accumulate_grad_batches": 2,
            "estimated_stepping_batches": 500, "is_global_zero": True, "callbacks": [], "callback_metrics": {},
            "global_step": batches_before // 2, "current_epoch": 0, "is_last_batch": False, "sanity_checking": False,
        }  # fmt: skip
        self.trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop), **(usual | how))
        self.display.on_validation_end(self.trainer)  # Lightning's sanity check
        self.display.on_train_start(self.trainer)
        self.clock.now += 59

    def batch(self) -> list[str]:
        """Train on a batch, and at an epoch's end validate for 10 s; what was said."""
        loop = self.trainer.fit_loop.epoch_loop
        loop.batch_idx = (loop.batch_idx + 1) % 40
        self.trainer.global_step += loop.batch_idx % 2
        self.clock.now += 1
        self.display.on_train_batch_end(self.trainer)
        if loop.batch_idx == 39:
            self.clock.now += 10
            self.display.on_validation_end(self.trainer)
            self.trainer.current_epoch += 1
        return self.capsys.readouterr().out.splitlines()

    def run(self, number: int) -> dict[int, str]:
        """What was said after which of so many batches."""
        return {batch: line for batch in range(1, number + 1) for line in self.batch()}


def test_training_says_when_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 2 s from the second on: ten seconds later; and with 10 s of validation after the epoch, never again.

    After 7 of 500 steps: 493 · 2 s. After 21: 38 + 10 s for 19 steps, 479 · 2.526 s.
    """
    said = Training(capsys).run(200)
    assert list(said) == [14, 42]
    assert re.fullmatch(rf"2 s/step within an epoch: the 493 steps to come take about 16 min, {END}", said[14])
    assert re.fullmatch(
        rf"2.53 s/step with validation and saving: the 479 steps to come take about 20 min, {END}", said[42]
    )


def test_a_resumed_run_counts_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """From step 400 of 500 on: 93 after seven more."""
    said = Training(capsys, batches_before=800).run(20)
    assert list(said) == [14]
    assert "the 93 steps to come take about 3 min" in said[14]


def test_a_run_that_ends_by_the_clock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """50 s that --max_time leaves, at 2 s a step."""
    timer = Timer(duration="00:01:00:00")
    monkeypatch.setattr(timer, "time_remaining", lambda: 50.0)
    said = Training(capsys, callbacks=[timer, Timer()]).run(20)
    line = r"2 s/step .*: --max_time ends the run after 25 of 493 steps to come, in about 50 s, done at"
    assert re.match(line, said[14])


@pytest.mark.parametrize("how", [{"is_global_zero": False}, {"estimated_stepping_batches": 11}])
def test_other_processes_and_short_runs_say_nothing(capsys: pytest.CaptureFixture[str], how: dict[str, Any]) -> None:
    """The second process; a run of which eight seconds are left when ten are over."""
    assert Training(capsys, **how).run(22) == {}


def tensors(file: Path) -> int:
    """Bytes of the weights and of the optimizer's state in a checkpoint, what is shared once."""
    saved = torch.load(file, weights_only=True)
    states = [state for one in saved.get("optimizer_states", []) for state in one["state"].values()]
    named = [*saved["state_dict"].items(), *(item for state in states for item in state.items())]
    found = [value for name, value in named if name != "step" and isinstance(value, torch.Tensor)]
    return sum({value.data_ptr(): value.nbytes for value in found}.values())


def clip(_: Path, **how: Any) -> CLIPWrapper:
    return CLIPWrapper("tiny", config_from_dict(TINY), **how)


def prompts(folder: Path, **how: Any) -> PromptCLIPWrapper:
    write_model(clip(folder).model, folder / "backbone.safetensors", "safetensors")
    return PromptCLIPWrapper(folder / "backbone.safetensors", PromptConfig(3, (0, 1), 0.0, class_token=True), **how)


def encoders(_: Path, **how: Any) -> CustomCLIPWrapper:
    return CustomCLIPWrapper(
        image_tower(), bert(add_pooling_layer=False), image_size=SIDE, avg_word_embs=True, tokenizer=tokenizer(), **how
    )


@pytest.mark.parametrize(
    ("build", "how"),
    [
        (clip, {}),
        (clip, {"optimizer": "sgd", "momentum": 0.9, "ema": 0.9}),
        (clip, {"optimizer": "sgd", "momentum": 0.0}),
        (clip, {"optimizer": "muon", "adam_statistics": "bfloat16", "lock_text": True, "ema": 0.9}),
        (clip, {"half_weights": "text", "distillation": "softmax", "ema": 0.9}),
        (clip, {"half_weights": "both", "adam_statistics": "bfloat16"}),
        (prompts, {"ema": 0.9}),
        (encoders, {"optimizer": "adamw"}),
    ],
)
def test_a_checkpoint_is_as_large_as_was_said(tmp_path: Path, build: Any, how: dict[str, Any]) -> None:
    """Every number of weights, moments and EMA in the files of a run of one step, against what was said before it."""
    module = build(tmp_path, **how)
    said = checkpoint_sizes(module)
    words = "w1 w2" if build is encoders else "a cat"
    picture = torch.zeros(3, module.model.image_size, module.model.image_size, dtype=torch.uint8)
    loader: Any = DataLoader([(picture, words)] * 4, batch_size=4)  # type: ignore[arg-type]
    bare_trainer(enable_checkpointing=True, callbacks=[Checkpoints(tmp_path)]).fit(module, loader)
    mean = tmp_path / "ema" / "last.ckpt"
    assert said == (tensors(tmp_path / "last.ckpt"), tensors(mean) if mean.exists() else 0)


def test_no_run_begins_that_cannot_be_saved(
    pair_folder: Path,
    model_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full: refused, and nothing is left; of a disk for two of four states it is said."""
    words = arguments(pair_folder, model_file, tmp_path / "run", "--epochs", "3")
    fill_disk(monkeypatch, 1000)
    with pytest.raises(
        SystemExit, match=rf"{tmp_path}/run/checkpoints: 1 kB of disk space are free. Expected room for \d+ MB"
    ):
        cli.main(words)
    assert not (tmp_path / "run").exists()
    cli.main([*words, "--enable_checkpointing", "false", "--output", str(tmp_path / "other")])
    assert "Optimizer steps to come: 9, up to epoch 3.\n" in capsys.readouterr().out
    state = checkpoint_sizes(clip(tmp_path))[0]
    fill_disk(monkeypatch, 2 * state)
    cli.main(words)
    assert (
        f"Optimizer steps to come: 9, up to epoch 3. Checkpoints take {estimates.size(state)} each, "
        f"{estimates.size(4 * state)} at most; {estimates.size(2 * state)} are free. Free space, or give --keep 1 or "
        "another --output.\n"
    ) in capsys.readouterr().out


def test_no_arrays_and_no_models_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """12 squares of 16 pixels are 9,216 bytes; those that are there take nothing."""
    folder = write_pairs(tmp_path / "pairs", 12)
    fill_disk(monkeypatch, 9215)
    with pytest.raises(UserError, match="Expected room for 9 kB, which 12 arrays take at least"):
        data_npz(folder, options=NpzOptions(16, 0))
    assert not list(folder.glob("npz/*"))
    fill_disk(monkeypatch, 9216)
    data_npz(folder, options=NpzOptions(16, 0))
    assert "12 arrays to write: at least 9 kB; 9 kB are free.\n" in capsys.readouterr().out
    fill_disk(monkeypatch, 0)
    assert data_npz(folder, options=NpzOptions(16, 0))["there"] == 12
    fill_disk(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"b.safetensors: 1 kB .* which the model takes"):
        write_model(clip(tmp_path).model, tmp_path / "b.safetensors", "safetensors")


def test_figures_stand_beside_chance_and_slow_runs_have_decimals(capsys: pytest.CaptureFixture[str]) -> None:
    """Of held-out figures each with its own chance; pairs a second from thousands to hundredths: written by hand."""
    figures = {"val/R@1_image_to_text": 0.25, "val/chance_R@1_image_to_text": 0.0625, "val/R@1_text_to_image": 0.5}
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
    training = Training(capsys)
    training.trainer.callback_metrics = metrics
    training.display.on_validation_end(training.trainer)
    assert capsys.readouterr().out == "epoch 1, step 0, held out:  R@1 i→t 25.0% (chance 6.2%)  R@1 t→i 50.0%\n"
    for speed, said in ((1463.2, "1,463"), (12.3, "12"), (3.21, "3.2"), (0.456, "0.46"), (0.0123, "0.012")):
        training.trainer.callback_metrics = {"train/pairs_per_second": torch.tensor(speed)}
        training.display.last_shown = -float("inf")
        training.clock.now += 1
        training.display.on_train_batch_end(training.trainer)
        assert f"pairs/s {said}  " in capsys.readouterr().out.splitlines()[-1] + "  "
