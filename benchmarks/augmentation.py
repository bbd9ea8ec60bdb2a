"""What augmentation costs: milliseconds for a batch of 256, beside a training step and torchvision's image by image.

    OMP_NUM_THREADS=1 python benchmarks/augmentation.py [--peer /path/to/env/bin/python]

On bytes, drawing included: jitter 1, grey 0.2 and both flips 0.5 (all), then the colours and one flip by themselves.
Processor time on a CPU, wall clock on a GPU, the median of rounds. The step is that of mini-8-64px in bf16, which the
emoji are trained with, forward and backward, with captions of 12 tokens. torchvision's is SimCLR's list of transforms
on each uint8 image in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from clock import now
from torch import Tensor

ROUNDS, BATCH, SIZES = 5, 256, (64, 224)


def main() -> None:
    """Print a row for each size and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="a Python that has torchvision")
    options = parser.parse_args()
    print("| 256 images of | what | ms |\n|---|---|---|")
    for size in SIZES:
        for name, taken in ours(size).items():
            print(f"| {size} pixels | {name} | {1000 * taken:,.1f} |", flush=True)
        if options.peer:
            call = [options.peer, __file__, "--torchvision", str(size)]
            found = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"| {size} pixels | torchvision, image by image | {1000 * float(found):,.1f} |", flush=True)
    taken = step()
    print(f"| 64 pixels | a step of mini-8-64px | {1000 * taken:,.1f} |")
    print(f"\nAll of it is {ours(64)['all'] / taken:.2%} of such a step.")


def ours(size: int) -> dict[str, float]:
    """Seconds of each way of ours."""
    from train_clip.data.augment import augment, draw_batch
    from train_clip.options import AugmentationOptions

    ways = {
        "all": AugmentationOptions(color_jitter=1.0, grayscale=0.2, horizontal_flip=0.5, vertical_flip=0.5),
        "colours": AugmentationOptions(color_jitter=1.0, grayscale=0.2),
        "one flip": AugmentationOptions(horizontal_flip=0.5),
    }
    images = pixels(size)

    def once(how: AugmentationOptions) -> Callable[[], object]:
        return lambda: augment(images, how, draw_batch(how, (0, 0), slice(None), BATCH).on(images.device))

    return {name: median(once(how)) for name, how in ways.items()}


def step() -> float:
    """Seconds of a forward and a backward pass of both towers with the loss."""
    from torch.nn import functional as F

    from train_clip.models.clip import CLIP
    from train_clip.models.config import read_config

    images = pixels(64)
    model = CLIP(read_config("mini-8-64px")).to(images.device)
    tokens = torch.randint(1, 49_000, (BATCH, 12), device=images.device)
    tokens[:, -1] = 49_407

    def once() -> None:
        model.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            similarity = model(images, tokens)[0]
        target = torch.arange(BATCH, device=images.device)
        (F.cross_entropy(similarity.float(), target) + F.cross_entropy(similarity.float().T, target)).backward()

    return median(once)


def torchvisions(size: int) -> float:
    """Seconds of SimCLR's transforms by torchvision."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
        ]
    )
    images = pixels(size)
    return median(lambda: torch.stack([transform(image) for image in images]))


def pixels(size: int) -> Tensor:
    """A batch of noise, uint8."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8, device=device)


def median(once: Callable[[], object]) -> float:
    """Seconds of a call, the median of rounds after a first one."""
    times = []
    for _ in range(ROUNDS + 1):
        started = now()
        once()
        times.append(now() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--torchvision"]:
        print(torchvisions(int(sys.argv[2])))
    else:
        main()
