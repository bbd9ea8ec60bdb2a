"""Zero-shot accuracy with the equal captions of a batch in the denominators and out of them.

    python benchmarks/equal_captions.py data_dir --output runs/equal_captions

Trains a small CLIP from scratch on pairs of few different captions, with ``--equal_captions keep`` and ``mask``, for as
many steps and from the same seeds, and classifies the held-out images among the captions that there are. The place of
an image's caption in their list, counted from 0, stands in ``STEM.cls``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from commands import captions_as_classes, command, evaluate, mean_and_spread

HELD_OUT = 0.2


def main() -> None:
    """Print a row a way and seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args()
    classes, templates = captions_as_classes(options.folder, options.output)
    share = ("--folder", options.folder, "--val_share", HELD_OUT)
    found: dict[str, list[float]] = {"keep": [], "mask": []}
    for seed in range(options.seeds):
        for way, accuracies in found.items():
            run = options.output / f"{way}-{seed}"
            how = ("--config", "cpu", "--image_size", options.image_size, "--epochs", options.epochs, "--seed", seed)
            where = ("--precision", options.precision, "--output", run)
            command("train", *how, *share, "--equal_captions", way, *where)
            among = ("--split", "held_out", "--classes", classes, "--templates", templates)
            scores = evaluate(run / "checkpoints" / "last.ckpt", *share, *among)
            accuracies.append(scores["zero_shot"]["top1"])
            print(f"{way}  seed {seed}  top-1 {accuracies[-1]:.1%} of {scores['num_images']:,} images", flush=True)
    for way, accuracies in found.items():
        print(f"{way}  top-1 {mean_and_spread(accuracies)} %")


if __name__ == "__main__":
    main()
