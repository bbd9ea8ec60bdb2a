"""What weights are, by their content: the same in whatever file, format or precision of file they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values.

    Args:
        tensors: on any device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(memoryview(values.contiguous().numpy()).cast("B") if values.numel() else b"")
    return digest.hexdigest()
