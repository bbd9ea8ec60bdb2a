"""AdamW in bfloat16 against a loop in float64: equal where it keeps float32, on average where it rounds."""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TINY
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.options import OptimizerOptions
from train_clip.training import half_precision as half_adamw
from train_clip.training.half_precision import HalfAdamW
from train_clip.training.optimizer import build_adamw

RATE, BETAS, EPS, DECAY = 3e-3, (0.9, 0.98), 1e-6, 0.2
COPIES = 40_000  # of each number, by whose mean an expectation is judged
NUMBERS: dict[str, Any] = {"learning_rate": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
HALF_MOMENTS = {"adam_statistics": "bfloat16"}
MODEL = CLIP(config_from_dict(TINY))


def optimizer_of(*parameters: nn.Parameter, half_moments: bool = True, **how: Any) -> HalfAdamW:
    """The first of the parameters decay, the last does not where there are several."""
    decayed, plain = (parameters[:-1], parameters[-1:]) if len(parameters) > 1 else (parameters, ())
    groups = [{"params": list(decayed), "weight_decay": how.pop("decay", DECAY)}]
    groups += [{"params": list(plain), "weight_decay": 0.0}] if plain else []
    seeding = {name: how.pop(name) for name in ("seed", "held_back") if name in how}
    return HalfAdamW(groups, OptimizerOptions(**NUMBERS | (HALF_MOMENTS if half_moments else {}) | how), **seeding)


class ByHand:
    """Algorithm 2 of AdamW's paper for one tensor, in float64."""

    def __init__(self, weights: Tensor, decay: float, rate: float = RATE, betas: tuple[float, float] = BETAS) -> None:
        self.w, self.decay, self.rate, self.betas = weights.detach().double().clone(), decay, rate, betas
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros_like(self.w), 0

    def step(self, gradient: Tensor) -> None:
        gradient, (one, two) = gradient.double(), self.betas
        self.t += 1
        self.m = one * self.m + (1 - one) * gradient
        self.v = two * self.v + (1 - two) * gradient**2
        m, v = self.m / (1 - one**self.t), self.v / (1 - two**self.t)
        self.w = self.w - self.rate * (m / (v.sqrt() + EPS) + self.decay * self.w)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_in_float32_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps of tensors of 0 to 4 dimensions, one in several pieces, one not contiguous: float64's loop to 1e-6."""
    monkeypatch.setitem(half_adamw.PIECE, "cpu", 100)
    shapes: list[tuple[int, ...]] = [(37, 11), (3, 4, 5, 6), (100,), (), (9,)]
    parameters = [nn.Parameter(seeded(*shape, seed=place)) for place, shape in enumerate(shapes)]
    parameters[1].data = parameters[1].data.to(memory_format=torch.channels_last)
    assert not parameters[1].is_contiguous()
    loops = [ByHand(parameter, DECAY if place < 4 else 0.0) for place, parameter in enumerate(parameters)]
    optimizer = optimizer_of(*parameters, half_moments=False)
    for step in range(6):
        for place, (parameter, loop) in enumerate(zip(parameters, loops, strict=True)):
            gradient = seeded(*parameter.shape, seed=100 * step + place)
            parameter.grad = gradient if place != 3 or step > 1 else None  # one whose gradient comes late
            if parameter.grad is not None:
                loop.step(gradient)
        optimizer.step()
    for parameter, loop in zip(parameters, loops, strict=True):
        torch.testing.assert_close(parameter.detach().double(), loop.w, rtol=1e-6, atol=1e-6)
        for name, moment in (("exp_avg", loop.m), ("exp_avg_sq", loop.v)):
            torch.testing.assert_close(optimizer.state[parameter][name].double(), moment, rtol=1e-5, atol=1e-7)


def columns(values: Tensor) -> Tensor:
    """Each number as a row of its copies."""
    return values[:, None].repeat(1, COPIES)


def assert_expected(found: Tensor, expected: Tensor) -> None:
    """Each is one of the two neighbours in bfloat16 of what it should be; the mean of a row is that itself.

    By Hoeffding, with a bound of (b - a) · 0.012 between the mean of 40,000 and the expectation: missed once in 10⁵.
    """
    assert found.dtype == torch.bfloat16
    step = 2.0 ** (expected.abs().log2().floor() - 7)
    assert ((found.double() - expected[:, None]).abs() < step[:, None]).all()
    assert ((found.double().mean(dim=1) - expected).abs() < 0.012 * step).all()


def test_what_is_expected_is_float64s_step() -> None:
    """One step from bfloat16's numbers: the mean of weights and both moments over 40,000 chances, decay included."""
    start = seeded(8, seed=1).bfloat16()
    parameter = nn.Parameter(columns(start))
    optimizer = optimizer_of(parameter)
    loop = ByHand(start, DECAY)
    loop.m, loop.v, loop.t = seeded(8, seed=2).bfloat16().double(), seeded(8, seed=3).abs().bfloat16().double(), 4
    optimizer.state[parameter].update(step=4, exp_avg=columns(loop.m.bfloat16()), exp_avg_sq=columns(loop.v.bfloat16()))
    gradient = seeded(8, seed=4).bfloat16()
    parameter.grad = columns(gradient)
    optimizer.step()
    loop.step(gradient)
    state = optimizer.state[parameter]
    for found, expected in ((parameter.detach(), loop.w), (state["exp_avg"], loop.m), (state["exp_avg_sq"], loop.v)):
        assert_expected(found, expected)


def test_the_noises_of_a_number_are_independent() -> None:
    """Of weights and both moments, of two parameters, of two steps: what was added by rounding does not correlate."""
    parameters = [nn.Parameter(torch.full((1, COPIES), 1.003).bfloat16()) for _ in range(2)]
    optimizer = optimizer_of(*parameters)
    added = []
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.777)
            parameter.data.fill_(1.0)
        optimizer.step()
        for parameter in parameters:
            state = optimizer.state[parameter]
            added += [tensor.detach().double().flatten() for tensor in (parameter, *map(state.get, half_adamw.MOMENTS))]
            # The next step begins with equal numbers again.
            for name in half_adamw.MOMENTS:
                state[name].fill_(state[name].float().mean().item())
    table = torch.corrcoef(torch.stack(added))
    assert table.isfinite().all()
    assert (table - torch.eye(len(added))).abs().max() < 5 / math.sqrt(COPIES)


def test_the_second_moment_decays_where_nearest_stands_still() -> None:
    """1,000 steps without a gradient at β₂ = 0.999: 0.999^1000 of it, to 1%; rounded to nearest it stays as it was."""
    parameter = nn.Parameter(torch.zeros(4, 5000).bfloat16())
    optimizer = optimizer_of(parameter, betas=(0.9, 0.999))
    start = torch.tensor([1.0, 1.5, 3e-9, 1.9e-30]).bfloat16()
    optimizer.state[parameter].update(
        step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=start[:, None].expand_as(parameter).clone()
    )
    nearest = start.clone()
    for _ in range(1000):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        nearest = (0.999 * nearest.float()).bfloat16()
    assert torch.equal(nearest, start)
    left = optimizer.state[parameter]["exp_avg_sq"].double().mean(dim=1) / start.double()
    torch.testing.assert_close(left, torch.full((4,), 0.999**1000, dtype=torch.float64), rtol=0.01, atol=0)


def test_weights_decay_where_nearest_stands_still() -> None:
    """1,000 steps without a gradient at ηλ = 1e-4: (1 - 1e-4)^1000 of them, to 0.2%; to nearest they stay."""
    start = torch.tensor([1.0, -1.5, 0.02, 1.99]).bfloat16()
    parameter = nn.Parameter(start[:, None].repeat(1, 5000))
    optimizer, nearest = optimizer_of(parameter, learning_rate=1e-3, decay=0.1), start.clone()
    for _ in range(1000):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        nearest = (nearest.float() * (1 - 1e-4)).bfloat16()
    assert torch.equal(nearest, start)
    left = parameter.detach().double().mean(dim=1) / start.double()
    torch.testing.assert_close(left, torch.full((4,), (1 - 1e-4) ** 1000, dtype=torch.float64), rtol=0.002, atol=0)


@pytest.mark.parametrize("waits", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_a_step_that_is_held_back_changes_nothing(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """``found_inf`` above 0 beside NaN in the gradient: weights and moments keep their bits; at 0 they move."""
    monkeypatch.setattr(half_adamw, "known_at_once", lambda _: not waits)
    parameter = nn.Parameter(seeded(5, 7).bfloat16())
    optimizer = optimizer_of(parameter, held_back=True)
    parameter.grad = seeded(5, 7, seed=1).bfloat16()
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = copy.deepcopy([parameter.detach(), *map(optimizer.state[parameter].get, half_adamw.MOMENTS)])
    optimizer.found_inf = torch.ones(())
    parameter.grad[0, 0] = torch.nan
    optimizer.step()
    after = [parameter.detach(), *map(optimizer.state[parameter].get, half_adamw.MOMENTS)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.state[parameter]["step"] == (2 if waits else 1)
    optimizer.found_inf, parameter.grad = torch.zeros(()), seeded(5, 7, seed=2).bfloat16()
    optimizer.step()
    assert not torch.equal(before[0], parameter.detach())


def model_of(seed: int, weights: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    for layer in (model[0], model[2]):
        layer.weight.data = layer.weight.data.to(weights)
    return model


def some_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, number: int) -> None:
    for step in range(first, first + number):
        for place, parameter in enumerate(model.parameters()):
            parameter.grad = seeded(*parameter.shape, seed=50 * step + place).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("half_moments", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_to_the_same_bits(weights: torch.dtype, half_moments: bool) -> None:
    """Three steps, the state through a dict, four more: as seven. Moments keep their type, whatever the weights'."""
    model = model_of(0, weights)
    optimizer = optimizer_of(*model.parameters(), half_moments=half_moments, seed=3)
    some_steps(model, optimizer, 0, 3)
    other = copy.deepcopy(model)
    again = optimizer_of(*other.parameters(), half_moments=half_moments, seed=3)
    again.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name in half_adamw.MOMENTS:
            one, two = optimizer.state[mine][name], again.state[theirs][name]
            expected = torch.bfloat16 if half_moments and mine.ndim >= 2 else torch.float32
            assert one.dtype == two.dtype == expected
            assert torch.equal(one, two)
            assert one.data_ptr() != two.data_ptr()
    some_steps(model, optimizer, 3, 4)
    some_steps(other, again, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_replicas_stay_equal_and_seeds_differ() -> None:
    """Two copies that are updated apart: the same bits; with another seed others."""
    models = [model_of(0, torch.bfloat16) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(int(torch.randint(99, ()).item()))
        some_steps(model, optimizer_of(*model.parameters(), seed=seed), 0, 5)
    first, second, third = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])


def test_six_bytes_a_parameter() -> None:
    """Weights and moments of a matrix, counted by their storages: 6 bytes a number with both, 12 with neither."""
    halves, whole = OptimizerOptions(**NUMBERS, **HALF_MOMENTS, half_weights="both"), OptimizerOptions(**NUMBERS)
    for dtype, options, expected in ((torch.bfloat16, halves, 6), (torch.float32, whole, 12)):
        parameter = nn.Parameter(seeded(64, 32).to(dtype))
        parameter.grad = seeded(64, 32).to(dtype)
        optimizer = build_adamw([{"params": [parameter]}], MODEL, options, False, 0)
        optimizer.step()
        tensors = [parameter, *(value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))]
        kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.ndim)
        assert kept == expected * parameter.numel()


def test_float32_runs_keep_the_fused_adamw() -> None:
    """Chosen by what is asked for, not by the weights."""
    groups = [{"params": [nn.Parameter(seeded(3, 3))]}]
    assert type(build_adamw(groups, MODEL, OptimizerOptions(**NUMBERS), True, 0)) is torch.optim.AdamW
    for one in (HALF_MOMENTS, {"half_weights": "text"}):
        assert type(build_adamw(groups, MODEL, OptimizerOptions(**NUMBERS, **one), True, 0)) is HalfAdamW


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled update with the same noise: equal but where its float32 differs in the last bit, 1 of 1,000."""
    models = [model_of(0, torch.bfloat16) for _ in range(2)]
    steps = half_adamw.adamw_step, torch.compile(half_adamw.adamw_step, dynamic=True)
    for model, step in zip(models, steps, strict=True):
        monkeypatch.setattr(half_adamw, "adamw_step", step)
        model[0].weight = nn.Parameter(seeded(300, 200).bfloat16())
        some_steps(model, optimizer_of(*model.parameters()), 0, 3)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (one != two).float().mean() <= 1e-3
        torch.testing.assert_close(one, two)
