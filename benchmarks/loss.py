"""Memory and time of the contrastive loss, both directions with their gradients, in tiles and on the whole matrix.

    OMP_NUM_THREADS=1 python benchmarks/loss.py

Each row is a process of its own, so that its peak is its own: on a CPU the largest resident size above what it had with
the embeddings alone, on a CUDA device the allocator's. Embeddings are float32 of 512 dimensions. The whole matrix is
left out where there is no memory for it. Times are processor time, the least of three.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 512
BATCHES = (4096, 8192, 16_384, 32_768)
WHOLE_UP_TO = 16_384
ROUNDS = 3
MIB = 2**20


def main() -> None:
    """Print a row for each batch and way."""
    print("| pairs | way | MiB above the embeddings | seconds | of the whole matrix's |\n|---|---|---|---|---|")
    for pairs in BATCHES:
        whole = None
        for way in ("whole", "tiles"):
            if way == "whole" and pairs > WHOLE_UP_TO:
                print(f"| {pairs:,} | whole | one matrix takes {4 * pairs**2 / 2**30:.0f} GiB | | |", flush=True)
                continue
            ended = subprocess.run(
                [sys.executable, __file__, str(pairs), way], check=True, stdout=subprocess.PIPE, text=True
            )
            memory, seconds = map(float, ended.stdout.split())
            whole = seconds if way == "whole" else whole
            ratio = f"{seconds / whole:.2f}" if whole else ""
            print(f"| {pairs:,} | {way} | {memory:,.0f} | {seconds:.2f} | {ratio} |", flush=True)


def measure(pairs: int, way: str) -> None:
    """Print peak memory in MiB and the least seconds of a loss with its gradient."""
    from train_clip.losses.tiles import tiled_info_nce

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = [F.normalize(torch.randn(pairs, WIDTH, device=device), dim=1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    one_direction = tiled_info_nce if way == "tiles" else on_the_whole_matrix
    warm = torch.randn(256, WIDTH, device=device)
    (warm @ warm.T).sum().item()
    before, times = peak(device), []
    for _ in range(ROUNDS):
        for leaf in (*sides, scale):
            leaf.grad = None
        started = now(device)
        loss = (one_direction(*sides, scale) + one_direction(*reversed(sides), scale)) / 2
        loss.backward()
        times.append(now(device) - started)
    print((peak(device) - before) / MIB, min(times))


def on_the_whole_matrix(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of all similarities at once."""
    return F.cross_entropy(scale * rows @ columns.T, torch.arange(len(rows), device=rows.device))


def peak(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now(device: str) -> float:
    """Seconds: of the processor on a CPU, of the clock on a device."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
    else:
        main()
