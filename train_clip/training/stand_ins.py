"""What stands in the places of a model's weights while it encodes, so that gradients of many chunks add up well.

Of weights that are kept in bfloat16 the gradients are added in float32, and the sum is rounded once. Of a table of
tokens each chunk's gradient is that of the rows which it looked up; the whole table's is made once a step.
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

from train_clip.models.blocks import SelfAttention

# Modules all of whose matrices go into products alone, which autocast computes in half precision.
PRODUCTS = (nn.Linear, nn.Conv2d, SelfAttention)
LARGE = 10_000  # rows of a table from which on it is worth gathering those that were looked up


class StandIns:
    """Stand-ins of a model's bfloat16 weights and of its tables.

    Of a weight that is a float32 copy; where autocast would cast that back to bfloat16, for a product, it is the weight
    as it is.

    Args:
        model: its parameters have to be what they are for as long as this is used.
        halves: whether weights in bfloat16 are kept so on purpose; those of bf16-true precision are not.
        tables: whether the gradients of tables are to come by their rows, which compiled look-ups cannot give.
    """

    def __init__(self, model: nn.Module, halves: bool, tables: bool = False) -> None:
        self._places: list[tuple[dict[str, Any], str, Callable[[], Tensor]]] = []
        self._tables: list[nn.Embedding] = []
        copies: dict[nn.Parameter, Tensor] = {}
        found = _half_weights(model) if halves else []
        uses = Counter(parameter for _, _, parameter in found)
        for module, name, parameter in found:
            if type(module) in PRODUCTS and uses[parameter] == 1 and autocast_type(parameter) == torch.bfloat16:
                stand_in = partial(_Carried.apply, _Carrier.apply(parameter), parameter.detach())
            else:
                # One copy of a weight that several modules share.
                if parameter not in copies:
                    copies[parameter] = parameter.float()
                stand_in = partial(_itself, copies[parameter])
            self._places.append((module._parameters, name, stand_in))
        for module in model.modules() if tables and torch.is_grad_enabled() else ():
            if not isinstance(module, nn.Embedding) or module.scale_grad_by_freq or module.max_norm is not None:
                continue
            table = module._parameters["weight"]
            if table is not None and table.requires_grad and len(table) >= LARGE:
                rows = _RowsToTable.apply(copies.get(table, table))
                self._places.append((module._parameters, "weight", partial(_itself, rows)))
                self._tables.append(module)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let them stand there."""
        weights = [parameters[name] for parameters, name, _ in self._places]
        sparse = [table.sparse for table in self._tables]
        for parameters, name, stand_in in self._places:
            parameters[name] = stand_in()
        for table in self._tables:
            table.sparse = True
        try:
            yield
        finally:
            for (parameters, name, _), weight in reversed(list(zip(self._places, weights, strict=True))):
                parameters[name] = weight
            for table, before in zip(self._tables, sparse, strict=True):
                table.sparse = before

    def around(self, encode: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Wrap what encodes a chunk, so that chunks meet in the stand-ins.

        That has to hold in the recomputation of a chunk too, which runs within the backward pass; hence no block around
        the step.

        Args:
            encode: maps (b, …) rows to (b, D).
        """

        def encode_in_place(rows: Any) -> Tensor:
            """Map (b, …) rows to (b, D)."""
            first = rows if isinstance(rows, Tensor) else next(iter(rows.values()))
            with self.in_place(), uncached_autocast(first.device.type):
                return encode(rows)

        return encode_in_place


def _half_weights(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.bfloat16
    ]


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


class _RowsToTable(Function):
    """A table, at which the rows of all chunks' gradients are gathered, and added into one gradient of the whole."""

    @staticmethod
    def forward(_: Any, table: Tensor) -> Tensor:
        """Give the table."""
        return table.view_as(table)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        """Add the rows up, once."""
        return gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]


def _itself(weight: Tensor) -> Tensor:
    return weight


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
