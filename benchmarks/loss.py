"""Memory and time of both losses with their gradients, the softmax in both directions, in tiles and on whole matrices.

    OMP_NUM_THREADS=1 python benchmarks/loss.py

Each row is a process of its own, so that its peak is its own: on a CPU the largest resident size above what it had with
the embeddings alone, on a CUDA device the allocator's. Embeddings are float32 of 512 dimensions. The whole matrix is
left out where there is no memory for it. Times are processor time, the least of three.
"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from clock import now
from torch import Tensor
from torch.nn import functional as F

from train_clip.losses import Pairs
from train_clip.losses.sigmoid import sigmoid_loss
from train_clip.losses.softmax import softmax_tile
from train_clip.losses.tiles import tiled_loss

LOSSES = ("softmax", "sigmoid")
WIDTH = 512
BATCHES = (4096, 8192, 16_384, 32_768)
WHOLE_UP_TO = 16_384
ROUNDS = 3
MIB = 2**20


def main() -> None:
    """Print a row for each batch, loss and way."""
    print(
        "| pairs | loss | way | MiB above the embeddings | seconds | of the whole matrix's |\n|---|---|---|---|---|---|"
    )
    for pairs, loss in itertools.product(BATCHES, LOSSES):
        whole = None
        for way in ("whole", "tiles"):
            if way == "whole" and pairs > WHOLE_UP_TO:
                print(
                    f"| {pairs:,} | {loss} | whole | one matrix takes {4 * pairs**2 / 2**30:.0f} GiB | | |", flush=True
                )
                continue
            ended = subprocess.run(
                [sys.executable, __file__, str(pairs), loss, way], check=True, stdout=subprocess.PIPE, text=True
            )
            memory, seconds = map(float, ended.stdout.split())
            whole = seconds if way == "whole" else whole
            ratio = f"{seconds / whole:.2f}" if whole else ""
            print(f"| {pairs:,} | {loss} | {way} | {memory:,.0f} | {seconds:.2f} | {ratio} |", flush=True)


def measure(pairs: int, loss: str, way: str) -> None:
    """Print peak memory in MiB and the least seconds of a loss with its gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = [F.normalize(torch.randn(pairs, WIDTH, device=device), dim=1).requires_grad_() for _ in range(2)]
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (14.3, -10.0))
    compute = WAYS[loss, way]
    warm = torch.randn(256, WIDTH, device=device)
    (warm @ warm.T).sum().item()
    before, times = peak(device), []
    for _ in range(ROUNDS):
        for leaf in (*sides, scale, bias):
            leaf.grad = None
        started = now()
        compute(*sides, scale, bias).backward()
        times.append(now() - started)
    print((peak(device) - before) / MIB, min(times))


def softmax_in_tiles(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    """Both directions."""
    ways = ((images, texts, scale, None), (texts, images, scale, None))
    return (tiled_loss(softmax_tile, ways[0]) + tiled_loss(softmax_tile, ways[1])) / 2


def softmax_on_whole_matrices(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    """Cross-entropy of all similarities at once, one direction after the other."""
    own = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(scale * images @ texts.T, own) + F.cross_entropy(scale * texts @ images.T, own)) / 2


def sigmoid_in_tiles(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One direction, which is both."""
    return sigmoid_loss(Pairs(images, texts, images, texts), scale, bias)


def sigmoid_on_the_whole_matrix(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As SigLIP's algorithm 1 has it."""
    labels = torch.full((len(images), len(texts)), -1.0, device=images.device).fill_diagonal_(1.0)
    return -F.logsigmoid(labels * (scale * images @ texts.T + bias)).sum() / len(images)


WAYS: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    ("softmax", "whole"): softmax_on_whole_matrices,
    ("softmax", "tiles"): softmax_in_tiles,
    ("sigmoid", "whole"): sigmoid_on_the_whole_matrix,
    ("sigmoid", "tiles"): sigmoid_in_tiles,
}


def peak(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    else:
        main()
