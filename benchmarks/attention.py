"""Forward and backward pass of attention on a CPU: the fused kernel beside plain products, by length.

    python benchmarks/attention.py

Prints a row a length and precision, and the ratio of the medians of runs taken in turn. ``PLAIN_UP_TO`` in
``train_clip/models/blocks.py`` follows from it.
"""

from __future__ import annotations

import statistics
import time
from unittest.mock import patch

import torch

from train_clip.models import blocks

LENGTHS = (17, 65, 77, 197, 257, 577)
HEADS, WIDTH_OF_HEAD, TOKENS, RUNS = 8, 64, 8192, 5


def main() -> None:
    """Measure every length in float32 and bfloat16."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {TOKENS} tokens, {HEADS} heads")
    print(f"{'length':>6}  {'precision':9}  {'causal':6}  {'fused ms':>8}  {'plain ms':>8}  {'fused/plain':>11}")
    for length in LENGTHS:
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (False, True):
                fused, plain = [], []
                for _ in range(RUNS):
                    fused.append(seconds(length, dtype, causal, plain_up_to=0))
                    plain.append(seconds(length, dtype, causal, plain_up_to=length))
                a, b = statistics.median(fused), statistics.median(plain)
                name = str(dtype).removeprefix("torch.")
                print(f"{length:6}  {name:9}  {causal!s:6}  {a * 1e3:8.1f}  {b * 1e3:8.1f}  {a / b:11.2f}")


def seconds(length: int, dtype: torch.dtype, causal: bool, plain_up_to: int) -> float:
    """Time one forward and backward pass."""
    shape = (TOKENS // length, length, HEADS * WIDTH_OF_HEAD)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)
    with patch.object(blocks, "PLAIN_UP_TO", plain_up_to):
        start = time.perf_counter()
        blocks.attend(q, k, v, HEADS, causal).backward(gradient)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
