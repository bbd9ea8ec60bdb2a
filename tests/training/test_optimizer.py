"""AdamW's groups by name, and the learning rate of every step against the formula and a table worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, config_from_dict
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.optimizer import (
    AdamWConfig,
    build_adamw,
    build_schedule,
    cosine_with_warmup,
    parameter_groups,
)

TEXT = {"context": 6, "vocab": 50, "layers": 1, "width": 8, "heads": 2}
IMAGES = {
    "ViT": {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2},
    "ResNet": {"size": 32, "blocks": [1, 1, 1, 1], "width": 4},
}


def config(image: str = "ViT") -> ModelConfig:
    return config_from_dict({"name": "tiny", "embed_dim": 8, "image": IMAGES[image], "text": TEXT})


def adamw(**how: Any) -> AdamWConfig:
    values = {"learning_rate": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2, "warmup_steps": None}
    return AdamWConfig(**(values | how))


# Groups


@pytest.mark.parametrize("image", IMAGES)
def test_decay_falls_on_what_is_no_gain_and_no_bias(image: str) -> None:
    """By name, as open_clip chooses: no bias, no norm, no temperature; each trainable parameter in one group."""
    model = CLIP(config(image))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.2)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    without = ("bias", "bn", "ln", "logit_scale", "class_embedding", "downsample.1")  # the last is a BatchNorm
    expected = {name for name in names.values() if not any(part in name for part in without)}
    assert {names[id(parameter)] for parameter in decayed["params"]} == expected
    assert {names[id(parameter)] for parameter in plain["params"]} == set(names.values()) - expected
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {"text_projection", "token_embedding.weight", "positional_embedding", "visual.conv1.weight"} <= expected


def test_frozen_parameters_are_left_out_and_shared_ones_come_once() -> None:
    """A locked layer, and a matrix under two names."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "locked": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["locked"].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.2)
    assert decayed["params"] == [model["a"].weight]
    assert [id(bias) for bias in plain["params"]] == [id(model["a"].bias), id(model["b"].bias)]


def test_an_empty_group_is_left_out() -> None:
    """Only vectors, or only matrices, to train: one group."""
    (group,) = parameter_groups(nn.LayerNorm(4), 0.2)
    assert group["weight_decay"] == 0.0
    (group,) = parameter_groups(nn.Linear(4, 4, bias=False), 0.2)
    assert group["weight_decay"] == 0.2


def test_a_step_without_gradient_shrinks_matrices_alone() -> None:
    """Decoupled decay: gradients of zero take a matrix to (1 - lr · λ) of itself, and leave a vector as it is."""
    layer = nn.Linear(3, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_adamw(layer, adamw(learning_rate=0.1, weight_decay=0.2))
    layer.weight.grad, layer.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight * (1 - 0.1 * 0.2))
    assert torch.equal(layer.bias, bias)


def test_the_optimizers_numbers_are_the_configurations() -> None:
    """Rate, betas and eps reach every group."""
    optimizer = build_adamw(nn.Linear(2, 2), adamw(learning_rate=3e-4, betas=(0.8, 0.95), eps=1e-7))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)


# The formula

HALF_ROOT = math.sqrt(0.5)
TABLES = {
    "2 steps up, 4 down": (2, 6, [1 / 2, 1, 1, (1 + HALF_ROOT) / 2, 1 / 2, (1 - HALF_ROOT) / 2, 0, 0]),
    "no warm-up": (0, 3, [1, 3 / 4, 1 / 4, 0, 0]),
    "one step up": (1, 3, [1, 1, 1 / 2, 0]),
    "a single step": (0, 1, [1, 0, 0]),
    "a single step of warm-up": (1, 1, [1]),
    "all warm-up": (4, 4, [1 / 4, 2 / 4, 3 / 4, 1]),
    "a warm-up longer than the run": (10, 3, [1 / 10, 2 / 10, 3 / 10]),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_cosine_by_hand(name: str) -> None:
    """Steps 0, 1, 2, … of short runs, worked out with the cosines of 0, 45, 60, 90, 120, 135 and 180 degrees."""
    warmup, steps, shares = TABLES[name]
    share = cosine_with_warmup(warmup, steps)
    assert [share(step) for step in range(len(shares))] == pytest.approx(shares, abs=1e-12)


def test_the_cosine_is_pytorchs() -> None:
    """After the warm-up, against CosineAnnealingLR over the steps that are left."""
    warmup, steps = 5, 42
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(reference, steps - warmup)
    share = cosine_with_warmup(warmup, steps)
    for step in range(warmup, steps + 1):
        assert share(step) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-9)
        reference.step()
        annealing.step()


@pytest.mark.parametrize(
    ("given", "steps", "warmup"),
    [
        (None, 100_000, 2000),
        (None, 20_000, 2000),
        (None, 19_990, 1999),
        (None, 100, 10),
        (None, 70, 7),
        (None, 19, 1),
        (None, 9, 0),
        (None, 1, 0),
        (30, 100, 30),
        (0, 100, 0),
    ],
)
def test_the_warm_up(given: int | None, steps: int, warmup: int) -> None:
    """2,000 steps or a tenth of the run, whichever is less; or what was asked for: at its end the rate is the peak."""
    optimizer = build_adamw(nn.Linear(2, 2), adamw(learning_rate=0.5))
    schedule = build_schedule(optimizer, given, steps)
    (share,) = {id(function): function for function in schedule.lr_lambdas}.values()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / max(1, warmup))
    assert share(warmup) == 1
    if warmup:
        assert share(warmup - 1) == 1
        assert share(0) == pytest.approx(1 / warmup)
    assert share(warmup + 1) < 1 or steps == warmup + 1


# Under Lightning


class Rates(L.Callback):
    """Notes the rate of each optimizer step that is really made."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        (rate,) = {group["lr"] for group in arguments[2].param_groups}
        self.rates.append(rate)


def loader(batches: int) -> DataLoader[Any]:
    """Batches of two random pictures and captions."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        (
            torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator),
            torch.randint(0, 50, (6,), generator=generator),
        )
        for _ in range(2 * batches)
    ]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def rates(
    folder: Path, batches: int, warmup: int | None = None, ckpt_path: Path | None = None, **how: Any
) -> list[float]:
    """The rates of a run of the tiny model."""
    seen = Rates()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [seen, *how.pop("callbacks", [])]
    trainer = L.Trainer(
        **(quiet | {"accelerator": "cpu", "devices": 1, "enable_model_summary": False} | how),
        callbacks=callbacks,
        default_root_dir=folder,
    )
    torch.set_num_threads(1)
    module = CLIPWrapper(config=config(), learning_rate=1e-3, warmup_steps=warmup)
    trainer.fit(module, loader(batches), ckpt_path=ckpt_path, weights_only=True)
    return seen.rates


def formula(steps: int, warmup: int) -> list[float]:
    """The rates of a whole run, from the paper's words: a line up, half a cosine down."""
    up = [1e-3 * (step + 1) / warmup for step in range(warmup)]
    down = [1e-3 * (1 + math.cos(math.pi * step / (steps - warmup))) / 2 for step in range(steps - warmup)]
    return up + down


RUNS = {
    "steps": (10, {"max_steps": 7, "max_epochs": -1}, 7),
    "steps over several epochs": (3, {"max_steps": 8, "max_epochs": -1}, 8),
    "epochs": (4, {"max_epochs": 3}, 12),
    "accumulation that divides": (6, {"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
    "accumulation with a partial window": (10, {"max_epochs": 2, "accumulate_grad_batches": 3}, 8),
    "accumulation and steps": (10, {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 3}, 5),
    "part of each epoch": (10, {"max_epochs": 2, "limit_train_batches": 4}, 8),
    "whichever ends first": (4, {"max_epochs": 2, "max_steps": 100}, 8),
    "a single step": (1, {"max_epochs": 1}, 1),
}


@pytest.mark.parametrize("warmup", [None, 0, 3])
@pytest.mark.parametrize("name", RUNS)
def test_every_step_has_the_formulas_rate(tmp_path: Path, name: str, warmup: int | None) -> None:
    """Steps, epochs and accumulation: each step's rate against the formula over the real number of steps."""
    batches, how, steps = RUNS[name]
    found = rates(tmp_path, batches, warmup, **how)
    assert len(found) == steps
    expected_warmup = steps // 10 if warmup is None else warmup
    if expected_warmup >= steps:
        assert found == pytest.approx([1e-3 * (step + 1) / expected_warmup for step in range(steps)])
    else:
        assert found == pytest.approx(formula(steps, expected_warmup), abs=1e-12)


def test_the_rate_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Saved after the first of two epochs: the second has the rest of the uninterrupted run's rates."""
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    how: dict[str, Any] = {"max_epochs": 2, "warmup": 3}
    whole = rates(tmp_path, 4, callbacks=[keep], enable_checkpointing=True, **how)
    assert whole == pytest.approx(formula(8, 3))
    # Within an epoch a plain loader begins anew; TextImageDataModule does not (test_a_run_goes_on_where_it_was_saved).
    assert rates(tmp_path, 4, ckpt_path=tmp_path / "kept" / "step=4.ckpt", **how) == pytest.approx(whole[4:])
