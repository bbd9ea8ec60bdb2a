"""What of a tensor that may be shared out (FSDP2) lies on this process."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(parameter: Tensor) -> tuple[int, ...]:
    """Which part of a parameter lies on this process, the same number on those that hold the same part."""
    if not isinstance(parameter, DTensor):
        return (0,)
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return tuple(
        place for place, placement in zip(coordinate, parameter.placements, strict=True) if not placement.is_replicate()
    )
