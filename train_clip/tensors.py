"""From the host to a device; seeds of random streams; what of a tensor that is sharded (FSDP2) lies on this process."""

import numpy as np
import torch
from torch.distributed.tensor import DTensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a host's tensor, not to be written to again, without waiting: a GPU copies pinned memory in its own time."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def seed_of(*key: int) -> int:
    """One seed of PyTorch's, from 0 to below 2⁶³, for a key of numbers, 0 or above."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """Which part of a parameter lies on this process, the same number on those that hold the same part."""
    if not isinstance(parameter, DTensor):
        return (0,)
    places = zip(parameter.device_mesh.get_coordinate() or (), parameter.placements, strict=True)
    return tuple(place for place, placement in places if not placement.is_replicate())
