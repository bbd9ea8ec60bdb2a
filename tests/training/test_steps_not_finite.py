"""A step whose loss or gradient is not finite changes nothing, and the run ends or, under a scaler, skips it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.errors import UserError
from train_clip.training.end_of_step import MOST_SKIPPED, FiniteSteps

B = 4
RESNET = {"size": 64, "blocks": [1, 1, 1, 1], "width": 2}


def pixels(batches: int, size: int = 16, poisoned: int | None = None) -> list[tuple[Tensor, str]]:
    """Normalised images with captions; one value of one image of the poisoned batch (from 0) is NaN."""
    images = torch.randn(batches * B, 3, size, size, generator=torch.Generator().manual_seed(0))
    if poisoned is not None:
        images[poisoned * B + 1, 0, 3, 3] = torch.nan
    return [(image, f"picture {index}") for index, image in enumerate(images)]


class Watch(L.Callback):
    """The whole state of training before each optimizer step, and the learning rate of each."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.before.append(everything(trainer))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def everything(trainer: L.Trainer) -> dict[str, Any]:
    """Copies of weights, buffers and the optimizer's state."""
    state = {name: tensor.clone() for name, tensor in trainer.lightning_module.state_dict().items()}
    for place, moments in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{place}.{name}": tensor.clone() for name, tensor in moments.items()}
    return state


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def run(
    config: Any,
    samples: list[Any],
    folder: Path,
    scaler: Any = None,
    *others: L.Callback,
    checkpoints: bool = True,
    validate: bool = False,
    **how: Any,
) -> tuple[L.Trainer, Watch, UserError | None]:
    """Train in order; the Trainer, what was watched, and the error that ended the run."""
    torch.manual_seed(0)
    watch = Watch()
    keep = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if checkpoints else []
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[watch, *others, *keep],
        enable_checkpointing=checkpoints,
        plugins=[] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 1} | how),
    )
    error = None
    module, loader = CLIPWrapper("tiny", config, warmup_steps=0), DataLoader(samples, batch_size=B)
    try:
        trainer.fit(module, loader, DataLoader(samples[:B], batch_size=B) if validate else None)
    except UserError as caught:
        error = caught
    return trainer, watch, error


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_poisoned_image_ends_the_run_before_its_step(tiny_config, tmp_path, accumulate, clip):
    """NaN in batch 5 of 6: the state is what it was before the step, each checkpoint on disk is finite."""
    how = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer, watch, error = run(tiny_config, pixels(6, poisoned=4), tmp_path, **how)
    batch = 5 if accumulate == 1 else 6
    assert str(error).startswith(f"Batch {batch}: the loss is nan, its gradient not finite; expected finite numbers. ")
    assert "changed any weights" in str(error)
    assert "--learning_rate" in str(error)
    first_of_step = 4 if accumulate == 1 else 3
    assert_equal(everything(trainer), watch.before[first_of_step])
    assert {file.name for file in tmp_path.iterdir()} == {
        f"step={step}.ckpt" for step in range(1, first_of_step // accumulate + 1)
    }
    for file in tmp_path.iterdir():
        saved = torch.load(file, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_learning_rate_is_to_blame_for_the_first_step(tiny_config, tmp_path, accumulate):
    """NaN before anything was learned, as of weights that were NaN from the start: the advice is to look at those."""
    _, _, error = run(tiny_config, pixels(3, poisoned=0), tmp_path, accumulate_grad_batches=accumulate)
    assert "check the weights that training starts from" in str(error)
    assert "learning_rate" not in str(error)


class Poison(L.Callback):
    """Puts one NaN into one parameter's gradient at some steps (from 0), on the way to the update."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step in self.steps:
            module.model.text_projection.grad.view(-1)[0] = torch.nan


def test_a_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(tiny_config, tmp_path):
    """One NaN in one parameter's gradient at the third step: the message gives the finite loss."""
    trainer, watch, error = run(tiny_config, pixels(4), tmp_path, None, Poison(2))
    assert " its gradient not finite; expected" in str(error)
    assert str(error).startswith("Batch 3: the loss is 1.")
    assert_equal(everything(trainer), watch.before[2])


def test_a_loss_that_is_not_finite_gives_no_finite_gradient():
    """An infinite loss with a finite gradient of its own: all gradients become NaN; a finite loss keeps its bits."""
    for value, finite in ((torch.inf, False), (torch.nan, False), (3.0, True)):
        weight = torch.tensor([0.3, -1.7], requires_grad=True)
        FiniteSteps().note_loss(weight.sin().sum() + value).backward()
        expected = weight.detach().cos()
        assert torch.equal(weight.grad, expected) if finite else weight.grad.isnan().all()


def test_a_device_that_runs_ahead_updates_nothing_until_the_flag_is_read(tiny_config, tmp_path, monkeypatch):
    """As on a GPU, where the flag is not read at once: from the poisoned step on nothing changes, nothing is saved.

    The fused update is held back by ``found_inf``; the flag is read at the logging interval, here at step 5.
    """
    monkeypatch.setattr("train_clip.training.end_of_step.known_at_once", lambda *_: False)
    trainer, watch, error = run(tiny_config, pixels(8, poisoned=2), tmp_path, log_every_n_steps=5, checkpoints=False)
    assert str(error).startswith("Batch 3: the loss is nan")
    assert trainer.global_step == 5
    for later in (watch.before[3], watch.before[4], everything(trainer)):
        assert_equal(later, watch.before[2])
    assert not torch.equal(watch.before[2]["model.logit_scale"], watch.before[1]["model.logit_scale"])


def test_a_save_reads_the_flag_first(tiny_config, tmp_path, monkeypatch):
    """The flag is unread when a checkpoint is due: the error comes before the file."""
    monkeypatch.setattr("train_clip.training.end_of_step.known_at_once", lambda *_: False)
    _, _, error = run(tiny_config, pixels(8, poisoned=2), tmp_path, log_every_n_steps=100)
    assert str(error).startswith("Batch 3: the loss is nan")
    assert {file.name for file in tmp_path.iterdir()} == {"step=1.ckpt", "step=2.ckpt"}


def test_validation_reads_the_flag_first(tiny_config, tmp_path, monkeypatch):
    """No figures of a model whose step went wrong."""
    monkeypatch.setattr("train_clip.training.end_of_step.known_at_once", lambda *_: False)
    how = {"log_every_n_steps": 100, "val_check_interval": 4, "checkpoints": False, "num_sanity_val_steps": 0}
    trainer, _, error = run(tiny_config, pixels(8, poisoned=2), tmp_path, validate=True, **how)
    assert str(error).startswith("Batch 3: the loss is nan")
    assert "val/loss" not in trainer.callback_metrics


def test_an_optimizer_without_such_a_flag_is_waited_for(tiny_config, tmp_path, monkeypatch):
    """An optimizer of the user's own that takes no ``found_inf``: read at once, wherever the flag is."""
    monkeypatch.setattr("train_clip.training.end_of_step.known_at_once", lambda *_: False)
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=False)
    plain.param_groups[0]["params"][0].grad = torch.full((2,), torch.nan)
    with pytest.raises(UserError, match="Batch 7"):
        FiniteSteps().before_update(plain, 7)


def test_a_scaler_skips_steps_and_the_run_goes_on(tiny_config, tmp_path):
    """16-mixed, one poisoned batch of eight: skipped; position, schedule and later steps go on, weights do not change.

    Against the run without the poison: the same learning rates, the same count of batches.
    """
    trainer, watch, error = run(tiny_config, pixels(8, poisoned=2), tmp_path / "a", scaler(64.0))
    clean, clean_watch, _ = run(tiny_config, pixels(8), tmp_path / "b", scaler(64.0))
    assert error is None
    assert_equal(watch.before[3], watch.before[2])
    assert not torch.equal(watch.before[4]["model.logit_scale"], watch.before[3]["model.logit_scale"])
    assert watch.rates == clean_watch.rates
    assert len(set(watch.rates)) == 8
    assert trainer.global_step == clean.global_step == 8
    assert trainer.lightning_module.consumed_batches == clean.lightning_module.consumed_batches == 8
    assert trainer.precision_plugin.scaler.get_scale() == 32.0
    assert all(tensor.isfinite().all() for tensor in everything(trainer).values())


def test_a_skipped_step_leaves_running_statistics_alone(tmp_path):
    """A ResNet under 16-mixed: NaN in the forward pass must not stay in the BatchNorms' statistics."""
    config = {"embed_dim": 16, "image": RESNET, "text": TINY["text"], "name": "tiny", "optimizer": TINY["optimizer"]}
    trainer, watch, error = run(config, pixels(4, 64, poisoned=1), tmp_path, scaler(64.0))
    assert error is None
    assert_equal(watch.before[2], watch.before[1])
    after = everything(trainer)
    statistics = [name for name in after if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(after[name].isfinite().all() for name in statistics)
    assert any(not torch.equal(after[name], watch.before[2][name]) for name in statistics)


@pytest.mark.parametrize(
    ("start", "batches", "message"),
    [
        (
            2.0**40,
            2 * MOST_SKIPPED,
            rf"Batch {MOST_SKIPPED}: the gradient was not finite in {MOST_SKIPPED} steps in a row",
        ),
        (4.0, 10, r"Batch 3: the gradient was not finite in 3 steps in a row, with the gradient scale down to 0\.5\."),
    ],
)
def test_a_scaler_that_finds_no_scale_ends_the_run(tiny_config, tmp_path, start, batches, message):
    """Every step poisoned: 20 in a row, or fewer where the scale falls below 1 before; nothing was changed."""
    trainer, watch, error = run(
        tiny_config, pixels(batches), tmp_path, scaler(start), Poison(*range(batches)), checkpoints=False
    )
    assert re.match(message, str(error))
    assert "--precision bf16-mixed" in str(error)
    assert_equal(everything(trainer), watch.before[0])


def test_skips_that_are_not_in_a_row_are_no_error(tiny_config, tmp_path):
    """Every second of 44 steps poisoned, at a scale that recovers: more than 20 skips, and the run ends by itself."""
    growing = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    poison = Poison(*range(0, 44, 2))
    trainer, _, error = run(tiny_config, pixels(44), tmp_path, growing, poison, checkpoints=False)
    assert error is None
    assert trainer.global_step == 44


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)
