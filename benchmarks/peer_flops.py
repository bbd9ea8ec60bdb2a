"""Floating-point operations of a training step of ``peer.py``'s cases, by ``measure_flops`` on the meta device.

    python benchmarks/peer_flops.py CASE TOKENS     (started by peer.py)

Twice: with captions of 77 tokens, as the paper and the peer compute them, and with rows as long as ours. Matrix
products, convolutions and attention count, forward and backward; a recomputation of micro-batches does not.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops, measure_flops
from peer_cases import from_json

from train_clip.models.clip import CLIP
from train_clip.models.config import read_config

COUNTED = 2  # pairs that are measured: a step is linear in them, but for the loss, whose share is below a thousandth


def main() -> None:
    """Print a line for the driver."""
    case, tokens = from_json(sys.argv[1]), int(sys.argv[2])
    with torch.device("meta"):
        model = CLIP(read_config(case.model))
    context = model.config.text.context
    full, real = (flops_of_pairs(model, length) * case.batch // COUNTED for length in (context, tokens))
    print(json.dumps({"full": full, "real": real, "device": device(), "available": available(case.precision)}))


def flops_of_pairs(model: CLIP, length: int) -> int:
    """Of a forward and a backward pass of some pairs.

    Args:
        model: on the meta device.
        length: tokens of a row.
    """
    size = model.image_size
    images = torch.empty(COUNTED, 3, size, size, device="meta")
    tokens = torch.empty(COUNTED, length, dtype=torch.int64, device="meta")

    def forward() -> Any:
        """Embed both sides."""
        return model.encode_image(images), model.encode_text(tokens)

    return measure_flops(model, forward, lambda embeddings: embeddings[0].sum() + embeddings[1].sum())


def device() -> str:
    """The device that training runs on, by its name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def available(precision: str) -> int | None:
    """Its dense peak in operations a second; None where it is not known."""
    if not torch.cuda.is_available():
        return None
    return get_available_flops(torch.device("cuda", 0), torch.bfloat16 if precision == "bf16" else torch.float32)


if __name__ == "__main__":
    main()
