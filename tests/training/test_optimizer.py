"""The groups by name, and the learning rate of every step against the formula and a table worked out by hand."""

from __future__ import annotations

import dataclasses
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
from train_clip.models.config import ModelConfig, OptimizerConfig, config_from_dict
from train_clip.options import OptimizerOptions, TrainingOptions
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.optimizer import build_adamw, build_optimizer, cosine_with_warmup, parameter_groups, warmup_for

TEXT = {"context": 6, "vocab": 50, "layers": 1, "width": 8, "heads": 2}
IMAGES = {
    "ViT": {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2},
    "ResNet": {"size": 32, "blocks": [1, 1, 1, 1], "width": 4},
}


def config(image: str = "ViT", **optimizer: Any) -> ModelConfig:
    made = config_from_dict({"name": "tiny", "embed_dim": 8, "image": IMAGES[image], "text": TEXT})
    return dataclasses.replace(made, optimizer=adamw(**optimizer))


def adamw(**how: Any) -> OptimizerConfig:
    """The paper's warm-up, in a configuration whose other numbers are made up."""
    values = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2, "warmup_steps": 2000, "epochs": 32}
    return OptimizerConfig(**(values | how))


NUMBERS: dict[str, Any] = {"learning_rate": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
OPTIONS = OptimizerOptions(**NUMBERS)


def adamw_of(module: nn.Module, **how: Any) -> torch.optim.Optimizer:
    """The optimizer of training from scratch, of all of a module."""
    options = dataclasses.replace(OPTIONS, **how)
    return build_adamw(parameter_groups(module, options, {}), CLIP(config()), options, False, 0)


# Groups


@pytest.mark.parametrize("image", IMAGES)
def test_decay_falls_on_what_is_no_gain_and_no_bias(image: str) -> None:
    """By name, as open_clip chooses: no bias, no norm, no temperature; each trainable parameter in one group."""
    model = CLIP(config(image))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, OPTIONS, {})
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
    decayed, plain = parameter_groups(model, OPTIONS, {})
    assert decayed["params"] == [model["a"].weight]
    assert [id(bias) for bias in plain["params"]] == [id(model["a"].bias), id(model["b"].bias)]


def test_an_empty_group_is_left_out() -> None:
    """Only vectors, or only matrices, to train: one group."""
    (group,) = parameter_groups(nn.LayerNorm(4), OPTIONS, {})
    assert group["weight_decay"] == 0.0
    (group,) = parameter_groups(nn.Linear(4, 4, bias=False), OPTIONS, {})
    assert group["weight_decay"] == 0.2


def test_a_step_without_gradient_shrinks_matrices_alone() -> None:
    """Decoupled decay: gradients of zero take a matrix to (1 - lr · λ) of itself, and leave a vector as it is."""
    layer = nn.Linear(3, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = adamw_of(layer, learning_rate=0.1, weight_decay=0.2)
    layer.weight.grad, layer.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight * (1 - 0.1 * 0.2))
    assert torch.equal(layer.bias, bias)


def test_the_optimizers_numbers_are_the_configurations() -> None:
    """Rate, betas and eps reach both groups, the decay that of the matrices."""
    optimizer = adamw_of(nn.Linear(2, 2), learning_rate=3e-4, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


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
    ("own", "steps", "warmup"),
    [
        (2000, 100_000, 2000),
        (2000, 20_000, 2000),
        (2000, 19_990, 1999),
        (2000, 100, 10),
        (2000, 70, 7),
        (2000, 19, 1),
        (2000, 9, 0),
        (2000, 1, 0),
        (30, 1000, 30),
        (30, 300, 30),
        (30, 299, 29),
        (0, 1000, 0),
    ],
)
def test_the_warm_up_where_none_is_given(own: int, steps: int, warmup: int) -> None:
    """The configuration's own number of steps or a tenth of the run, rounded down, whichever is less: by hand."""
    assert warmup_for(steps, adamw(warmup_steps=own)) == warmup


def test_the_warm_up_is_a_whole_tenth_of_every_run() -> None:
    """Runs of up to 20,000 steps, against the quotient of integers: no tenth is lost to floating point."""
    assert all(warmup_for(steps, adamw()) == min(2000, steps // 10) for steps in range(1, 20_001))


@pytest.mark.parametrize(
    ("warmup", "steps"), [(2000, 100_000), (10, 100), (1, 19), (30, 31), (30, 100), (0, 1), (0, 9)]
)
def test_the_schedule_peaks_at_the_end_of_the_warm_up(warmup: int, steps: int) -> None:
    """One share for all groups: the first rate is a warm-up's part of the peak, the last of it the peak, then less."""
    optimizer = adamw_of(nn.Linear(2, 2), learning_rate=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(warmup, steps))
    (share,) = {id(function): function for function in schedule.lr_lambdas}.values()
    assert all(group["lr"] == pytest.approx(0.5 / max(1, warmup)) for group in optimizer.param_groups)
    assert share(warmup) == 1
    if warmup:
        assert share(warmup - 1) == 1
        assert share(0) == pytest.approx(1 / warmup)
    assert share(warmup + 1) < 1


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
            torch.cat([torch.randint(0, 49, (5,), generator=generator), torch.tensor([49])]),
        )
        for _ in range(2 * batches)
    ]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def rates(
    folder: Path, batches: int, warmup: int | None = None, ckpt_path: Path | None = None, own: int = 2000, **how: Any
) -> list[float]:
    """The rates of a run of the tiny model, whose configuration has a warm-up of its own."""
    seen = Rates()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [seen, *how.pop("callbacks", [])]
    trainer = L.Trainer(
        **(quiet | {"accelerator": "cpu", "devices": 1, "enable_model_summary": False} | how),
        callbacks=callbacks,
        default_root_dir=folder,
    )
    torch.set_num_threads(1)
    module = CLIPWrapper(config=config(warmup_steps=own), learning_rate=1e-3, warmup_steps=warmup)
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


@pytest.mark.parametrize(("own", "given", "warmup"), [(1, None, 1), (2000, None, 2), (1, 4, 4), (2000, 0, 0)])
def test_the_warm_up_of_a_run(tmp_path: Path, own: int, given: int | None, warmup: int) -> None:
    """Twenty steps: the one that is given; else the model's own, or a tenth of the run: against the formula."""
    assert rates(tmp_path, 20, given, own=own, max_epochs=1) == pytest.approx(formula(20, warmup), abs=1e-12)


def test_the_rate_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Saved after the first of two epochs: the second has the rest of the uninterrupted run's rates."""
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    how: dict[str, Any] = {"max_epochs": 2, "warmup": 3}
    whole = rates(tmp_path, 4, callbacks=[keep], enable_checkpointing=True, **how)
    assert whole == pytest.approx(formula(8, 3))
    # Within an epoch a plain loader begins anew; TextImageDataModule does not (test_a_run_goes_on_where_it_was_saved).
    assert rates(tmp_path, 4, ckpt_path=tmp_path / "kept" / "step=4.ckpt", **how) == pytest.approx(whole[4:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [{"adam_statistics": "bfloat16"}, {"optimizer": "muon"}, {"optimizer": "muon", "adam_statistics": "bfloat16"}],
    ids=lambda how: " ".join(how.values()),
)
def test_an_update_waits_for_no_device(how: dict[str, Any]) -> None:
    """The second update, which has its state already, and may be held back: it synchronises nothing."""
    model = CLIP(config()).cuda()
    options = TrainingOptions.of(NUMBERS | {"optimizer": "adamw", "momentum": 0.95} | how)
    optimizer = build_optimizer(model, model, options, fused=True)
    optimizer.found_inf = torch.zeros((), device="cuda")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
