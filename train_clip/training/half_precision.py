"""Weights and optimizer state in bfloat16: stochastic rounding, and an AdamW that uses it.

Rounded to nearest, small changes are lost however often they are made: at β₂ = 0.999 the second moment could not decay.
OpenAI trained CLIP with weights that are "rounded up or down at random by their distance" (openai/CLIP, issue 29). What
has one dimension or none, a thousandth of a model, stays float32.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.models.clip import DualEncoder
from train_clip.options import OptimizerOptions
from train_clip.tensors import local, seed_of, shard_of
from train_clip.training.end_of_step import known_at_once

Groups = list[dict]  # of an optimizer's parameters

HALF_STEP = 1 << 15  # of the 2^16 float32 numbers from one bfloat16 number to the next
TOP_16_BITS = -(1 << 16)
# Numbers updated at a time, which bounds what is held in float32: on a CPU such pieces stay in the cache.
PIECE = {"cpu": 1 << 17}
LARGE_PIECE = 1 << 24  # elsewhere, where each piece costs the time of some launches
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them


def narrow(model: DualEncoder, options: OptimizerOptions) -> None:
    """Keep in bfloat16, rounded to nearest, what is to be."""
    for parameter in to_narrow(model, options):
        parameter.data = parameter.data.bfloat16()


def to_narrow(model: DualEncoder, options: OptimizerOptions) -> Iterator[nn.Parameter]:
    """The matrices that are trained of the towers that ``half_weights`` names, unless they are in bfloat16 already."""
    for tower, name in zip(model.towers(), ("image", "text"), strict=True):
        for parameter in tower if options.half_weights in (name, "both") else ():
            if parameter.requires_grad and parameter.ndim >= 2 and parameter.dtype == torch.float32:
                yield parameter


def widen(model: nn.Module, options: OptimizerOptions) -> None:
    """Keep them in float32 again, the same numbers."""
    for parameter in model.parameters():
        if options.has_half_weights and parameter.dtype == torch.bfloat16:
            parameter.data, parameter.grad = parameter.data.float(), None


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Round each number to one of its two neighbors a < b in bfloat16, so that its mean is the number itself.

        P(b) = (x - a) / (b - a)

    bfloat16 is the upper half of float32's bits: adding u, uniform in [0, 2^16), carries into it with the probability
    that the lower half has. ``noise`` is int16, u - 2^15. Numbers of bfloat16, infinities and NaN stay.
    """
    carried = (values.view(torch.int32) + noise).add_(HALF_STEP).bitwise_and_(TOP_16_BITS)
    # Clamped to 1, a number is 1 and NaN is NaN, of which a carry into the sign could have made a number.
    return carried.view(torch.float32).mul_(values.clamp(1.0, 1.0)).to(torch.bfloat16)


def draw(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """Draw noise, four numbers of 16 bits at a time: (rows, length) int16, on the generator's device."""
    count = rows * length
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    # From the least int64 on: without a bound PyTorch draws 63 bits.
    drawn.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return drawn.view(torch.int16)[:count].view(rows, length)


class HalfOptimizer(torch.optim.Optimizer):
    """An optimizer that rounds stochastically what it keeps in bfloat16, and that a flag on the device can hold back.

    The noise of an update follows from (seed, step, the parameter's place, its shard) alone: replicas on equal devices
    stay equal bit for bit, and a resumed run repeats it. Not to be held back under a gradient scaler, which would leave
    the unscaling to the optimizer.
    """

    found_inf: Tensor | None = None  # () float32; above 0, nothing changes

    def __init__(self, groups: Groups, defaults: dict, options: OptimizerOptions, seed: int, held_back: bool) -> None:
        super().__init__(groups, defaults)
        self._state_type = getattr(torch, options.adam_statistics)
        self._seed, self._step_supports_amp_scaling = seed, held_back

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self.found_inf is None or not (known_at_once(self.found_inf) and self.found_inf > 0):
            self._places = {parameter: place for place, parameter in enumerate(_listed(self.param_groups))}
            self.update()
        return loss

    def update(self) -> None:
        """Update all parameters that have a gradient."""
        raise NotImplementedError

    @override
    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # PyTorch gives state the type of its weights: back to the type that it was saved in.
        for place, parameter in zip(_listed(state_dict["param_groups"]), _listed(self.param_groups), strict=True):
            for name, kept in state_dict["state"].get(place, {}).items():
                if isinstance(kept, Tensor) and name != "step":
                    self.state[parameter][name] = kept.to(parameter.device, copy=True)

    def next_state(self, parameter: Tensor, *names: str) -> dict:
        """The state of a parameter, in the step that begins; zeros at first."""
        state = self.state[parameter]
        if not state:
            dtype = self._state_type if parameter.ndim >= 2 else torch.float32
            state |= {"step": 0} | {name: torch.zeros_like(parameter, dtype=dtype) for name in names}
        # Ahead of the truth once an update is held back on a GPU: nothing is saved from there on.
        state["step"] += 1
        return state

    def noise(self, parameter: Tensor, *key: int) -> torch.Generator:
        """The source of the noise of a parameter's step."""
        step, place = self.state[parameter]["step"], self._places[parameter]
        seed = seed_of(self._seed, step, place, *shard_of(parameter), *key)
        return torch.Generator(parameter.device).manual_seed(seed)

    def write(self, old: Tensor, new: Tensor) -> None:
        """Write new numbers, where nothing holds the update back."""
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


def _listed(groups: Groups) -> list:
    return [parameter for group in groups for parameter in group["params"]]


class HalfAdamW(HalfOptimizer):
    """AdamW for weights and moments of float32 and bfloat16, mixed as they come.

        w ← R(w (1 - ηλ) - η m̂ / (√v̂ + ε))        m ← R(β₁ m + (1 - β₁) g)        v ← R(β₂ v + (1 - β₂) g²)
        m̂ = m / (1 - β₁ᵗ)        v̂ = v / (1 - β₂ᵗ)        R rounds stochastically what is kept in bfloat16

    (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.) Computed in float32, decay included, and rounded once.
    """

    def __init__(self, groups: Groups, options: OptimizerOptions, seed: int = 0, held_back: bool = False) -> None:
        defaults = {"lr": options.learning_rate, "betas": options.betas, "eps": options.eps, "weight_decay": 0.0}
        super().__init__(groups, defaults, options, seed, held_back)

    @override
    def update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: Any, group: dict) -> None:
        state = self.next_state(parameter, *MOMENTS)
        kept = [local(tensor) for tensor in (parameter.detach(), *(state[name] for name in MOMENTS))]
        flat = [tensor.reshape(-1) for tensor in kept]
        num_rounded = sum(tensor.dtype == torch.bfloat16 for tensor in kept)
        generator, size = self.noise(parameter), PIECE.get(parameter.device.type, LARGE_PIECE)
        for piece, *now in zip(
            *(tensor.split(size) for tensor in (local(parameter.grad).reshape(-1), *flat)), strict=True
        ):
            then = adamw_step(now, piece, group, state["step"], draw(generator, num_rounded, len(piece)))
            for old, new in zip(now, then, strict=True):
                self.write(old, new)
        for tensor, values in zip(kept, flat, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(values.view_as(tensor))


def adamw_step(kept: list[Tensor], gradient: Tensor, group: dict, step: int, noise: Tensor) -> list[Tensor]:
    """The next w, m, v of ``kept``, (n,) each, computed in float32, rounded once where they are kept in bfloat16.

    Of the noise, (k, n) int16, there is a row for each of the kept that is bfloat16.
    """
    rate, (beta1, beta2) = group["lr"], group["betas"]
    weights, first, second = (tensor.float() for tensor in kept)
    gradient = gradient.float()
    first = first.lerp(gradient, 1 - beta1)
    second = (second * beta2).add_(gradient.square().mul_(1 - beta2))
    size = second.sqrt().mul_(1 / math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights = (weights * (1 - rate * group["weight_decay"])).sub_((first / size).mul_(rate / (1 - beta1**step)))
    rows = iter(noise)
    return [
        round_stochastically(wide, next(rows)) if tensor.dtype == torch.bfloat16 else wide
        for tensor, wide in zip(kept, (weights, first, second), strict=True)
    ]
