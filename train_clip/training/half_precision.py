"""Towers whose weights are kept in bfloat16 while they train; ``stand_ins.py`` is how they encode then.

Gains and biases, of one dimension, stay float32: they are a thousandth of a tower, and a gain near 1 would move by
1/128 at a time.

float32 → bfloat16 by chance, so that the mean over the chances is the number itself.

    x between neighbours a < b of bfloat16:    P(b) = (x - a) / (b - a)        E = x

Rounded to nearest, a change below half the distance to the next number is lost however often it is made. OpenAI's CLIP
was trained with weights that are "rounded up or down at random by their distance" (github.com/openai/CLIP, issue 29).

AdamW whose two moments, whose weights, or both are kept in bfloat16: 6 bytes a parameter in place of 12.

    w ← R(w (1 - ηλ) - η m̂ / (√v̂ + ε))        m ← R(β₁ m + (1 - β₁) g)        v ← R(β₂ v + (1 - β₂) g²)
    m̂ = m / (1 - β₁ᵗ)        v̂ = v / (1 - β₂ᵗ)        R rounds by chance what is kept in bfloat16 (``rounding.py``)

(AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.) All of it is computed in float32 from what is kept,
decay included, and rounded once. Rounded to nearest, v could grow but not decay: at β₂ = 0.999 a step takes at most a
thousandth of it, and the numbers of bfloat16 lie 1/256 to 1/128 apart. So do weights, of which decay takes ηλ a step.

Gains, biases and temperatures, which have one dimension or none, are a thousandth of a model: they and their moments
stay float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train_clip.models.clip import DualEncoder
from train_clip.options import OptimizerOptions
from train_clip.tensors import local, seed_of, sent, shard_of
from train_clip.training.end_of_step import known_at_once

HALF_STEP = 1 << 15  # of the 2^16 float32 numbers from one bfloat16 number to the next
TOP_16_BITS = -(1 << 16)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Round each number to one of its two neighbours in bfloat16.

    bfloat16 is the upper half of float32's bits: adding u, uniform in [0, 2^16), carries into it with the probability
    that the lower half has, and the lower half is cut off. Numbers of bfloat16 stay what they are, infinities and NaN
    too; what lies beyond the largest of them may become infinite, as it may when rounded to nearest.

    Args:
        values: (…) float32.
        noise: (…) int16, u - 2^15, uniform over its whole range.

    Returns:
        (…) bfloat16.
    """
    carried = (values.view(torch.int32) + noise).add_(HALF_STEP).bitwise_and_(TOP_16_BITS)
    # Clamped to 1, a number is 1 and NaN is NaN, of which a carry into the sign could have made a number.
    return carried.view(torch.float32).mul_(values.clamp(1.0, 1.0)).to(torch.bfloat16)


class Noise:
    """Random numbers of a run that follow from its seed and a key alone, drawn on whichever device they are for.

    Args:
        seed: 0 or above.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def at(self, device: torch.device, *key: int) -> torch.Generator:
        """A device's generator, at the start of the stream that a key of numbers, 0 or above, stands for."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        reseed(self._generators[device], self._seed, *key)
        return self._generators[device]


def reseed(generator: torch.Generator, *key: int) -> None:
    """Set a generator to the start of the stream that a key of numbers, 0 or above, stands for."""
    generator.manual_seed(seed_of(*key))


def draw(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """Draw noise, four numbers of 16 bits at a time: (rows, length) int16, on the generator's device."""
    count = rows * length
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    # From the least int64 on: without a bound PyTorch draws 63 bits.
    drawn.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return drawn.view(torch.int16)[:count].view(rows, length)


# Numbers updated at a time, which bounds what is held in float32: on a CPU such pieces stay in the cache.
PIECE = {"cpu": 1 << 17}
LARGE_PIECE = 1 << 24  # elsewhere, where each piece costs the time of some launches
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them


class HalfAdamW(Optimizer):
    """AdamW for weights and moments of float32 and bfloat16, mixed as they come.

    The noise of a parameter's update follows from (seed, its step, its place, its shard) alone: replicas on equal
    devices stay equal bit for bit, and a run that goes on repeats it.

    Args:
        groups: of parameters, float32 or bfloat16, with ``weight_decay`` and maybe ``lr``.
        lr: η.
        betas: β₁, β₂.
        eps: ε.
        half_moments: keep the moments of parameters of two dimensions and more in bfloat16.
        seed: 0 or above.
        held_back: take ``found_inf``, () float32, as PyTorch's fused optimizers do: above 0, nothing changes. Not
            under a gradient scaler, which would leave the unscaling to the optimizer.
        compiled: compile the update, which takes seconds and pays on a GPU.
    """

    found_inf: Tensor | None = None

    def __init__(  # noqa: PLR0913, AdamW's and three more
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        half_moments: bool,
        seed: int = 0,
        held_back: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._half_moments = half_moments
        self._step_supports_amp_scaling = held_back
        self._update = torch.compile(update, dynamic=True) if compiled else update
        self._noise = Noise(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and known_at_once(self.found_inf) and self.found_inf > 0:
            return loss
        place = 0
        for group in self.param_groups:
            numbers: dict[tuple[int, torch.device], Tensor] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    # Ahead of the truth once an update is held back on a GPU: nothing is saved from there on.
                    state["step"] += 1
                    key = (state["step"], parameter.device)
                    if key not in numbers:
                        numbers[key] = sent(torch.tensor(numbers_of(group, state["step"])), parameter.device)
                    self._step_one(parameter, place, numbers[key])
                place += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, whose moments keep the type that they have there."""
        super().load_state_dict(state_dict)
        keep_types(self, state_dict)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            dtype = torch.bfloat16 if self._half_moments and parameter.ndim >= 2 else torch.float32
            state["step"] = 0
            state |= {name: torch.zeros_like(parameter, dtype=dtype) for name in MOMENTS}
        return state

    def _step_one(self, parameter: Tensor, place: int, numbers: Tensor) -> None:
        """Update a parameter, a piece at a time."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        kept = [local(parameter.detach()), *(local(state[name]) for name in MOMENTS)]
        flat = [tensor.reshape(-1) for tensor in kept]
        num_rounded = sum(tensor.dtype == torch.bfloat16 for tensor in kept)
        generator = self._noise.at(parameter.device, state["step"], place, *shard_of(parameter))
        size = PIECE.get(parameter.device.type, LARGE_PIECE)
        for now, piece in zip(
            zip(*(tensor.split(size) for tensor in flat), strict=True),
            local(gradient).reshape(-1).split(size),
            strict=True,
        ):
            noise = draw(generator, num_rounded, len(piece))
            then = self._update(now, piece, numbers, noise)
            for old, new in zip(now, then, strict=True):
                old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))
        for tensor, values in zip(kept, flat, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(values.view_as(tensor))


def keep_types(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Give what was loaded the type that it was saved in: PyTorch gives statistics the type of the weights.

    Args:
        optimizer: has loaded the state.
        state_dict: of an optimizer with the same groups.
    """
    places = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for place, parameter in zip(places, own, strict=True):
        for name, kept in state_dict["state"].get(place, {}).items():
            if isinstance(kept, Tensor) and name != "step":
                optimizer.state[parameter][name] = kept.to(parameter.device, copy=True)


def numbers_of(group: dict[str, Any], step: int) -> tuple[float, ...]:
    """What an update multiplies by and adds, worked out in float64.

    Args:
        group: of the optimizer.
        step: t, from 1.

    Returns:
        1 - ηλ, η / (1 - β₁ᵗ), 1 - β₁, β₂, 1 - β₂, 1 / √(1 - β₂ᵗ), ε.
    """
    rate, (beta1, beta2) = group["lr"], group["betas"]
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    return (
        1 - rate * group["weight_decay"],
        rate / bias1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(bias2),
        group["eps"],
    )


def update(kept: tuple[Tensor, ...], gradient: Tensor, numbers: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """One step of some numbers, in float32, each rounded once where it is kept in bfloat16.

    Args:
        kept: w, m, v, each (n,) float32 or bfloat16.
        gradient: g, (n,) float.
        numbers: (7,) float32, of ``numbers_of``.
        noise: (k, n) int16, a row for each of the kept that is bfloat16.

    Returns:
        The next w, m, v, of the types that they are kept in.
    """
    shrink, rate, new_first, keep_second, new_second, root, eps = numbers.unbind()
    weights, first, second = (tensor.float() for tensor in kept)
    gradient = gradient.float()
    first = first.lerp(gradient, new_first)
    second = (second * keep_second).add_(gradient.square().mul_(new_second))
    size = second.sqrt().mul_(root).add_(eps)
    weights = (weights * shrink).sub_((first / size).mul_(rate))
    rows = iter(noise.unbind())
    return tuple(
        round_stochastically(wide, next(rows)) if tensor.dtype == torch.bfloat16 else wide
        for tensor, wide in zip(kept, (weights, first, second), strict=True)
    )


def narrow(model: DualEncoder, tuning: OptimizerOptions) -> None:
    """Keep in bfloat16 what is trained of the towers that are to be half as wide, rounded to nearest."""
    for tower, which in zip(model.towers(), ("image", "text"), strict=True):
        if tuning.half_weights in (which, "both"):
            for parameter in tower:
                if parameter.requires_grad and parameter.ndim >= 2 and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def widen(model: nn.Module, tuning: OptimizerOptions) -> None:
    """Keep them in float32 again, the same numbers."""
    for parameter in model.parameters():
        if tuning.has_half_weights and parameter.dtype == torch.bfloat16:
            parameter.data, parameter.grad = parameter.data.float(), None
