"""What an update takes beside the rest of a step: AdamW, and Muon with AdamW, in turn, from one gradient.

    python benchmarks/optimizers.py [--threads 1]

Prints milliseconds of processor time (of device time on a GPU) for a step without its update, for either update, and by
how much Muon's lengthens the step. bfloat16 autocast, captions of eight tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from clock import now

from train_clip import CLIPWrapper
from train_clip.options import TrainingOptions
from train_clip.training.optimizer import build_optimizer

CASES = (("mini-8-64px", 256), ("ViT-B/32", 64))
ROUNDS = 5
TOKENS = 8


@dataclass
class Times:
    """Milliseconds, one a round."""

    step: list[float]
    adamw: list[float]
    muon: list[float]


def main() -> None:
    """Time both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| model, batch | forward and backward, ms | AdamW | Muon | step longer by |\n|---|---|---|---|---|")
    for name, batch in CASES:
        found = measure(name, batch, device, options.rounds)
        step, adamw, muon = (statistics.median(values) for values in (found.step, found.adamw, found.muon))
        longer = (step + muon) / (step + adamw) - 1
        print(f"| {name}, {batch} | {step:.0f} | {adamw:.0f} | {muon:.0f} | {longer:.1%} |", flush=True)


def measure(name: str, batch: int, device: torch.device, rounds: int) -> Times:
    """Time a model's step and both updates, after a round that is thrown away."""
    torch.manual_seed(0)
    module = CLIPWrapper(name).to(device)
    model = module.model
    optimizers = []
    for kind in ("adamw", "muon"):
        how = {"optimizer": kind, "momentum": None}
        optimizers.append(build_optimizer(module, model, TrainingOptions.of(module.options.flat() | how), fused=True))
    images = torch.randint(256, (batch, 3, model.image_size, model.image_size), dtype=torch.uint8, device=device)
    texts = torch.randint(1, 40_000, (batch, TOKENS), device=device)
    texts[:, -1] = 49_407
    own = torch.arange(batch, device=device)

    def step() -> None:
        """Forward and backward."""
        module.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            similarity, _ = model(images, texts)
        torch.nn.functional.cross_entropy(similarity.float(), own).backward()

    times = Times([], [], [])
    for number in range(rounds + 1):
        found = [milliseconds(part) for part in (step, optimizers[0].step, optimizers[1].step)]
        for values, value in zip((times.step, times.adamw, times.muon), found, strict=True):
            values += [value] if number else []
    return times


def milliseconds(part: Callable[[], object]) -> float:
    """Time of a part."""
    start = now()
    part()
    return 1000 * (now() - start)


if __name__ == "__main__":
    main()
