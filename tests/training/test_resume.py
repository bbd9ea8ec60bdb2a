"""A run that was stopped anywhere and resumed is the run that was not, in data, figures and weights: bit for bit."""

from __future__ import annotations

import csv
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from tests.conftest import TINY, write_pairs
from train_clip import CLIPWrapper
from train_clip.checkpoints.own import read_checkpoint
from train_clip.errors import UserError
from train_clip.training.checkpoints import AtomicCheckpointIO, Checkpoints, Interval
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.display import MetricsLog
from train_clip.training.same_run import require_same
from train_clip.training.signals import Stopped

PAIRS, BATCH, EPOCHS = 22, 4, 3  # 4 to hold out, 18 to train on: 4 batches an epoch
BATCHES = 4
AUGMENTED = {"color_jitter": 1.0, "grayscale": 0.2, "horizontal_flip": 0.5, "vertical_flip": 0.5}
CHANCE = {"minibatch_size": 3, "mask_ratio": 0.5, "unmasked_share": 0.4, "stochastic_depth": 0.5}
HALVES = {"half_weights": "text", "adam_statistics": "bfloat16"}


class Dropping(CLIPWrapper):
    """With dropout in both towers: the random state of every step shows in the weights."""

    def __init__(self, **how: Any) -> None:
        super().__init__("tiny", TINY, **how)
        for block in (*self.model.visual.transformer.resblocks, *self.model.transformer.resblocks):
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.2))


class Seen(L.Callback):
    """Digests of the pixels and captions of each batch, in order."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, int]] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        batch = arguments[2]
        weights = torch.arange(batch.images.numel(), dtype=torch.float64).view_as(batch.images)
        self.batches.append(((batch.images * weights).sum().item(), int((batch.texts * 31).sum())))


def crash_at(hook: str, count: int) -> L.Callback:
    """Ends a run the ``count``-th time that a hook is called."""
    left = [count]

    def crash(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyError(hook)

    callback = L.Callback()
    setattr(callback, hook, crash)
    return callback


def fit(run: Path, resume: Path | None = None, *crashes: L.Callback, warmup_steps: int = 2, **how: Any) -> Seen:
    """Train into a folder as the command does, and return what was seen. What begins anew saves every step."""
    torch.manual_seed(0)
    seen = Seen()
    saving = Checkpoints(run / "checkpoints", Interval(steps=99 if resume else 1), keep=99)
    tuning = {"minibatch_size": 3} | how.pop("tuning", {})
    first_step = 0 if resume is None else read_checkpoint(resume)["global_step"]
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[seen, *crashes, saving],
        plugins=[AtomicCheckpointIO(), *how.pop("plugins", [])],
        logger=MetricsLog(run, first_step),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **({"max_epochs": EPOCHS} | how),
    )
    module = Dropping(learning_rate=1e-2, warmup_steps=warmup_steps, **tuning)
    # The global generator stands elsewhere in a new process.
    torch.manual_seed(99 if resume else 1)
    data = TextImageDataModule(run.parent / "data", BATCH, image_size=16, context_length=16, val_share=0.2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """An uninterrupted run, with every state that it saved."""
    folder = tmp_path_factory.mktemp("whole")
    write_pairs(folder / "data", PAIRS)
    return folder / "run", fit(folder / "run")


@pytest.fixture(autouse=True)
def data(whole: tuple[Path, Seen], tmp_path: Path) -> None:
    """The same pairs beside each test's runs."""
    (tmp_path / "data").symlink_to(whole[0].parent / "data")


def test_a_run_that_is_made_longer_follows_the_new_length_at_once(whole: tuple[Path, Seen], tmp_path: Path) -> None:
    """3 epochs that become 5, from step 7 and from the end: each rate is the cosine over 20 steps, by the formula."""
    run = whole[0]
    for step in (7, 12):
        fit(tmp_path / f"from-{step}", saved(run, step), max_epochs=5)
        rates = [float(row["train/learning_rate"]) for row in rows(tmp_path / f"from-{step}") if "train/loss" in row]
        expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * (s - 2) / (20 - 2))) for s in range(step, 20)]
        assert rates == pytest.approx(expected, rel=1e-5)


def saved(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}.ckpt"


def state(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a checkpoint, with its place."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in pairs:
            yield from tensors(item, f"{path}/{name}")
    else:
        yield path, value


def assert_same_state(found: Path, expected: Path) -> None:
    """Weights, optimizer, schedule, scaler, position: all that training goes on from, bit for bit."""
    a, b = state(found), state(expected)
    for part in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "epoch",
        "global_step",
        "MixedPrecision",
    ):
        own, other = dict(tensors(a.get(part))), dict(tensors(b.get(part)))
        assert own.keys() == other.keys(), part
        for name, value in other.items():
            same = torch.equal(own[name], value) if isinstance(value, Tensor) else own[name] == value
            assert same, f"{part}{name}"
    means = [read_checkpoint(mean) for run in (found, expected) if (mean := run / "checkpoints/ema/last.ckpt").exists()]
    for own, other in zip(tensors(means[0]), tensors(means[1]), strict=True) if means else ():
        assert torch.equal(own[1], other[1]) if isinstance(own[1], Tensor) else own == other, own[0]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "logs" / "metrics.csv").open() as file:
        read = csv.DictReader(file)
        return [{name: value for name, value in row.items() if value} for row in read]


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 11])
def test_a_run_resumed_at_any_step_ends_alike(whole: tuple[Path, Seen], tmp_path: Path, step: int) -> None:
    """From saved states within epochs and on their edges: data, weights, optimizer, schedule, bit for bit."""
    run, seen = whole
    rest = fit(tmp_path / "run", saved(run, step))
    assert rest.batches == seen.batches[step:]
    assert_same_state(tmp_path / "run", run)


@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("on_train_batch_start", 3),
        ("on_before_optimizer_step", 5),
        ("on_train_batch_end", 7),
        ("on_validation_batch_start", 2),
        ("on_validation_end", 2),
        ("on_train_epoch_end", 1),
        ("on_train_epoch_start", 3),
    ],
)
def test_a_run_that_crashed_ends_alike_in_its_own_folder(
    whole: tuple[Path, Seen], tmp_path: Path, hook: str, count: int
) -> None:
    """Crashed in any hook and resumed from its last state: also the figures of each step, each once, are the same.

    A validation at an epoch's end that was cut short is not run again: the second epoch's figures are missing.
    """
    run, seen = tmp_path / "run", whole[1]
    with pytest.raises(KeyError, match=hook):
        fit(run, None, crash_at(hook, count), num_sanity_val_steps=0)
    done = state(run)["global_step"]
    rest = fit(run, run / "checkpoints" / "last.ckpt")
    assert rest.batches == seen.batches[done:]
    assert_same_state(run, whole[0])
    cut_short = "2" if hook == "on_validation_batch_start" else None
    assert rows(run) == [row for row in rows(whole[0]) if "val/loss" not in row or row["epoch"] != cut_short]


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_batch_start"])
def test_a_run_that_crashed_at_an_epochs_end_and_in_the_next_ends_alike(
    whole: tuple[Path, Seen], tmp_path: Path, hook: str
) -> None:
    """Interrupted twice: what Lightning counts of epochs is right after the first time."""
    run, seen = tmp_path / "run", whole[1]
    for resume, crash in (
        (None, crash_at(hook, 2)),
        (run / "checkpoints" / "last.ckpt", crash_at("on_train_batch_start", 3)),
    ):
        with pytest.raises(KeyError):
            fit(run, resume, crash, num_sanity_val_steps=0)
    assert state(run)["global_step"] == 10
    rest = fit(run, run / "checkpoints" / "last.ckpt")
    assert rest.batches == seen.batches[10:]
    assert_same_state(run, whole[0])


@pytest.mark.parametrize("why", ["max_steps", "should_stop"])
def test_a_run_that_ended_within_an_epoch_goes_on_in_it(whole: tuple[Path, Seen], tmp_path: Path, why: str) -> None:
    """Ended after 6 of 12 batches by max_steps or early stopping, then resumed: the other 6 of the data."""
    run = tmp_path / "run"
    if why == "max_steps":
        fit(run, None, max_steps=6)
    else:
        stopper = L.Callback()
        stopper.on_train_batch_end = lambda trainer, *rest: setattr(
            trainer, "should_stop", rest[-1] == 1 and bool(trainer.current_epoch)
        )  # type: ignore[method-assign]
        fit(run, None, stopper)
    assert state(run)["callbacks"]["EndOfStep"]["consumed_batches"] == 6
    rest = fit(run, run / "checkpoints" / "last.ckpt")
    assert rest.batches == whole[1].batches[6:]
    assert state(run)["epoch"] == state(whole[0])["epoch"]
    if why == "should_stop":
        assert_same_state(run, whole[0])


@pytest.mark.parametrize("longer", [{"max_steps": 16}, {}], ids=str)
def test_a_run_that_max_steps_ended_at_an_epochs_end_goes_on_in_the_next(
    whole: tuple[Path, Seen], tmp_path: Path, longer: dict[str, int]
) -> None:
    """8 steps, 4 an epoch, then resumed: bit for bit the run of three or four epochs that was given its length at once.

    The warm-up outlasts them all, so that no rate depends on the length.
    """
    how = {"warmup_steps": 100, "max_epochs": 3 + (longer == {"max_steps": 16})}
    seen = fit(tmp_path / "expected", None, **how | longer)
    fit(tmp_path / "run", None, **how, max_steps=8)
    rest = fit(tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt", **how | longer)
    assert rest.batches == seen.batches[8:]
    assert_same_state(tmp_path / "run", tmp_path / "expected")
    assert rows(tmp_path / "run") == rows(tmp_path / "expected")


def test_a_run_that_ends_before_its_learning_rate_says_so(
    whole: tuple[Path, Seen], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped by another callback after 6 of 12 steps: said; not where all 12 are done."""
    caplog.set_level("INFO")
    stopper = L.Callback()
    stopper.on_train_batch_end = lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == 6)  # type: ignore[method-assign]
    fit(tmp_path / "run", None, stopper)
    assert "The run ended after 6 of 12 optimizer steps, before the end of the learning rate schedule" in caplog.text
    caplog.clear()
    fit(tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert "The run ended after" not in caplog.text


def test_a_run_whose_schedule_is_over_is_refused(whole: tuple[Path, Seen], tmp_path: Path) -> None:
    """From step 7 of 12 with accumulation over 4, 3 steps for the whole: an error, not steps at a rate of 0."""
    with pytest.raises(
        UserError, match=r"has done 7 optimizer steps of 12, and its length is now 3: no steps are left"
    ):
        fit(tmp_path / "run", saved(whole[0], 7), accumulate_grad_batches=4)


def test_another_precision_goes_on(whole: tuple[Path, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-mixed, whose update is not fused, resumed in float32, whose is; flags are read later, as on a GPU."""
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    fit(tmp_path / "half", None, plugins=[half], max_steps=6)
    monkeypatch.setattr("train_clip.training.end_of_step.known_at_once", lambda *_: False)
    rest = fit(tmp_path / "full", tmp_path / "half" / "checkpoints" / "last.ckpt")
    assert rest.batches == whole[1].batches[6:]
    assert state(tmp_path / "full")["optimizer_states"][0]["param_groups"][0]["fused"] is True


def test_scoring_asks_for_no_same_run(whole: tuple[Path, Seen]) -> None:
    """``trainer.validate(ckpt_path=…)`` with another rate and another batch than the run's: it is scored."""
    how = {"image_size": 16, "context_length": 16, "val_share": 0.2}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = TextImageDataModule(whole[0].parent / "data", 2, **how)
    figures = trainer.validate(
        Dropping(learning_rate=0.5), data, ckpt_path=saved(whole[0], 3), weights_only=True, verbose=False
    )
    assert 0 <= figures[0]["val/mean_recall"] <= 1


@pytest.mark.parametrize("batch", [2, 4, 7], ids=["within an epoch", "its last batch", "within a later one"])
def test_a_run_that_was_stopped_by_a_signal_ends_alike(whole: tuple[Path, Seen], tmp_path: Path, batch: int) -> None:
    """SIGTERM in a batch, resumed in its folder: state and figures are the same, those of that batch and epoch too."""
    run = tmp_path / "run"
    left = [batch]

    def send(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    sender = L.Callback()
    sender.on_train_batch_start = send  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        fit(run, None, sender)
    assert state(run)["global_step"] == batch
    fit(run, run / "checkpoints" / "last.ckpt")
    assert_same_state(run, whole[0])
    assert rows(run) == rows(whole[0])


def test_a_run_with_other_numbers_is_refused(whole: tuple[Path, Seen], tmp_path: Path) -> None:
    """Under a bare Trainer too: another rate, which the optimizer's state would overrule, and another global batch."""
    run, path = whole[0], saved(whole[0], 3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = {"image_size": 16, "context_length": 16, "val_share": 0.2}
    module = Dropping(learning_rate=0.5, warmup_steps=2)
    with pytest.raises(UserError, match=r"learning_rate 0\.5, was 0\.01"):
        trainer.fit(module, TextImageDataModule(run.parent / "data", BATCH, **data), ckpt_path=path, weights_only=True)
    module = Dropping(learning_rate=1e-2, warmup_steps=2)
    with pytest.raises(UserError, match=r"batch_size 2, was 4"):
        trainer.fit(module, TextImageDataModule(run.parent / "data", 2, **data), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize(
    "how",
    [
        {"val_check_interval": 2},
        {"limit_train_batches": 3},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"max_epochs": -1, "max_steps": 10},
        {"max_steps": 7, "tuning": AUGMENTED},
        {"scaler": True, "gradient_clip_val": 0.1},
        {"tuning": HALVES, "precision": "bf16-mixed", "accumulate_grad_batches": 3},
        {"tuning": {"ema": 0.999} | HALVES, "scaler": True, "gradient_clip_val": 0.1},
        {"tuning": {"optimizer": "muon", "adam_statistics": "bfloat16"}, "precision": "bf16-mixed"},
        {"tuning": CHANCE, "accumulate_grad_batches": 3},
        {"tuning": {"loss": "sigmoid", "equal_captions": "mask"}, "accumulate_grad_batches": 3},
        {"tuning": {"ema": 0.5}, "accumulate_grad_batches": 3, "val_check_interval": 2},
    ],
    ids=lambda how: " ".join(map(str, how)),
)
def test_so_does_every_kind_of_run(tmp_path: Path, how: dict[str, Any]) -> None:
    """Accumulation over 3 of 4 batches, validation within epochs, parts of epochs, precisions, clipping, max_steps.

    Weights and moments in bfloat16; images augmented; patches and blocks left out by chance; a running mean of the
    weights. Resumed from the first step, the end of the first epoch and the last step but one.
    """

    def train(run: Path, resume: Path | None = None) -> Seen:
        own = how | {"tuning": {"minibatch_size": 0} | how.get("tuning", {})}
        if own.pop("scaler", False):
            own["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
        return fit(run, resume, **own)

    run = tmp_path / "run"
    seen = train(run)
    consumed = {
        int(file.stem[5:]): read_checkpoint(file)["callbacks"]["EndOfStep"]["consumed_batches"]
        for file in sorted((run / "checkpoints").glob("step-*"))
    }
    ends_epoch = next(step for step, batches in consumed.items() if batches == how.get("limit_train_batches", BATCHES))
    for step in {1, ends_epoch, max(consumed) - 1}:
        rest = train(tmp_path / f"from-{step}", saved(run, step))
        assert rest.batches == seen.batches[consumed[step] :], step
        assert_same_state(tmp_path / f"from-{step}", run)


def test_values_within_values_are_compared():
    """Of a model's configuration each number counts, and is named."""
    with pytest.raises(UserError, match=r"config\.image\.layers 3, was 2"):
        require_same({"config": {"image": {"layers": 3}}}, {"config": {"image": {"layers": 2}}}, "{found}")
    require_same({"config": {"layers": 3}}, {"config": {"layers": 2}}, "{found}", free=("config",))
    for own, kept in (({}, {"ema": 0.9}), ({"ema": 0.9}, {})):
        with pytest.raises(UserError, match="ema"):
            require_same(own, kept, "{found}")
