"""What of a tensor that may be shared out (FSDP2) lies on this process.

From the host to a device.

Seeds of random streams that are told apart by several numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting for it: a GPU copies what lies in pinned memory in its own time.

    Args:
        tensor: on the host; not to be written to again.
        device: any.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def seed_of(*key: int) -> int:
    """One seed of PyTorch's, from 0 to below 2⁶³, for a key of numbers, 0 or above."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


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
