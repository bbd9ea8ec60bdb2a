"""Towers whose weights are kept in bfloat16 while they train, and gradients that are summed in float32 all the same.

Gains and biases, of one dimension, stay float32: they are a thousandth of a tower, and a gain near 1 would move by
1/128 at a time. A tower encodes with float32 copies of its weights, made once a batch, or with the weights where they
are cast to bfloat16 anyway. The gradients of all chunks are added in float32, and the sum is rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from train_clip.errors import UserError
from train_clip.models.blocks import SelfAttention
from train_clip.models.dual_encoder import DualEncoder
from train_clip.training.tuning import Tuning

# Modules all of whose matrices go into products alone, which autocast computes in half precision.
PRODUCTS = (nn.Linear, nn.Conv2d, SelfAttention)
FLOAT32_WEIGHTS = ("32-true", "16-mixed", "bf16-mixed")


def narrow(model: DualEncoder, tuning: Tuning) -> None:
    """Keep in bfloat16 what is trained of the towers that are to be half as wide, rounded to nearest."""
    for tower, which in zip(model.towers(), ("image", "text"), strict=True):
        if tuning.half_weights in (which, "both"):
            for parameter in tower:
                if parameter.requires_grad and parameter.ndim >= 2 and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def widen(model: nn.Module, tuning: Tuning) -> None:
    """Keep them in float32 again, the same numbers."""
    for parameter in model.parameters():
        if tuning.half_weights != "none" and parameter.dtype == torch.bfloat16:
            parameter.data, parameter.grad = parameter.data.float(), None


def require_float32(tuning: Tuning, precision: str) -> None:
    """Refuse what is kept in bfloat16 beside a precision that changes the type of all weights.

    Raises:
        UserError: it does.
    """
    if tuning.keeps_halves and precision not in FLOAT32_WEIGHTS:
        raise UserError(
            f"--precision {precision}: --half_weights and --adam_statistics are for weights that are float32 "
            f"otherwise. Use one of {', '.join(FLOAT32_WEIGHTS)}, or leave the two options out."
        )


class WideWeights:
    """What stands in the places of a model's bfloat16 weights while it encodes, and takes their gradients in float32.

    That is a float32 copy; under autocast to bfloat16, which would cast the copy back for a matrix product, the weight
    as it is.

    Args:
        model: its parameters have to be what they are for as long as this is used.
        tuning: whether there are such weights; those of bf16-true precision are none.
    """

    def __init__(self, model: nn.Module, tuning: Tuning) -> None:
        found = [
            (module, name, parameter)
            for module in (() if tuning.half_weights == "none" else model.modules())
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dtype == torch.bfloat16
        ]
        uses = Counter(parameter for _, _, parameter in found)
        copies: dict[nn.Parameter, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Callable[[], Tensor]]] = []
        for module, name, parameter in found:
            if isinstance(module, PRODUCTS) and uses[parameter] == 1 and autocast_type(parameter) == torch.bfloat16:
                stand_in = partial(_Carried.apply, _Carrier.apply(parameter), parameter.detach())
            else:
                # One copy of a weight that several modules share.
                if parameter not in copies:
                    copies[parameter] = parameter.float()
                stand_in = partial(_itself, copies[parameter])
            self._places.append((module._parameters, name, stand_in))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let them stand there."""
        weights = [parameters[name] for parameters, name, _ in self._places]
        for parameters, name, stand_in in self._places:
            parameters[name] = stand_in()
        try:
            yield
        finally:
            for (parameters, name, _), weight in zip(self._places, weights, strict=True):
                parameters[name] = weight

    def around(self, encode: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Wrap what encodes a chunk, so that each chunk's gradient is added in float32.

        That has to hold in the recomputation of a chunk too, which runs within the backward pass; hence no block around
        the step.

        Args:
            encode: maps (b, …) rows to (b, D).
        """

        def encode_wide(rows: Any) -> Tensor:
            """Map (b, …) rows to (b, D)."""
            first = rows if isinstance(rows, Tensor) else next(iter(rows.values()))
            with self.in_place(), uncached_autocast(first.device.type):
                return encode(rows)

        return encode_wide


class _Carrier(Function):
    """A weight → float32 of its shape and of no memory, at which gradients of the chunks are added in float32."""

    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:
        """Make zeros that are all the same one."""
        return torch.zeros((), device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(_: Any, *sums: Tensor) -> Tensor:
        """Round the sum, once."""
        return sums[0].bfloat16()


class _Carried(Function):
    """The weight itself, for one chunk, whose gradient goes to the carrier."""

    @staticmethod
    def forward(_: Any, _carrier: Tensor, weight: Tensor) -> Tensor:
        """Give the weight."""
        return weight.view_as(weight)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Widen the chunk's gradient."""
        return gradients[0].float(), None


def _itself(copy: Tensor) -> Tensor:
    return copy


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts to on a tensor's device; None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """Whatever autocast is on, without its cache of weights.

    With it all chunks share one half-precision copy of a weight, at which their gradients are added in half precision:
    over 128 chunks of a small model in bfloat16 that is off by 2 to 4% (tests/training/test_half_weights.py).
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
