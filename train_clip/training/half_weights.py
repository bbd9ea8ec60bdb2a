"""Towers whose weights are kept in bfloat16 while they train, and gradients that are summed in float32 all the same.

Gains and biases, of one dimension, stay float32: they are a thousandth of a tower, and a gain near 1 would move by
1/128 at a time. A tower encodes with float32 copies of its weights, made once a batch. The gradients of all chunks meet
at the copy, and their sum is rounded once on its way to the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from train_clip.errors import UserError
from train_clip.models.dual_encoder import DualEncoder
from train_clip.training.tuning import Tuning

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
    """float32 copies of a model's bfloat16 weights, through which gradients flow.

    Args:
        model: its parameters have to be what they are for as long as the copies are used.
        tuning: whether there are such weights; those of bf16-true precision are none.
    """

    def __init__(self, model: nn.Module, tuning: Tuning) -> None:
        copies: dict[nn.Parameter, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        for module in () if tuning.half_weights == "none" else model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype == torch.bfloat16:
                    # One copy of a weight that several modules share.
                    copy = copies.setdefault(parameter, parameter.float())
                    self._places.append((module._parameters, name, copy))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the copies stand in the weights' places."""
        weights = [parameters[name] for parameters, name, _ in self._places]
        for parameters, name, copy in self._places:
            parameters[name] = copy
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


def uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """Whatever autocast is on, without its cache of weights.

    With it all chunks share one half-precision copy of a weight, at which their gradients are added in half precision:
    over 256 chunks of a small model in bfloat16 that is off by 0.7% (tests/training/test_half_weights.py).
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
