"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting for it: a GPU copies what lies in pinned memory in its own time.

    Args:
        tensor: on the host; not to be written to again.
        device: any.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
