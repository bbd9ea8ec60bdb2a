r"""Held-out retrieval after fine-tuning two encoders with InfoNCE alone, with softmax and with transport targets.

    python benchmarks/distillation.py data_dir --image_encoder train-clip:CHECKPOINT --text_encoder hf:FOLDER \
        --output runs/distillation

As many steps of each, from the same seeds. Words after ``--`` go to ``train-clip finetune``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from commands import command, evaluate, mean_and_spread, own_and_further, recalls

HELD_OUT = 0.1
WAYS = ("none", "softmax", "transport")


def main() -> None:
    """Print a row a way and seed, then the means."""
    own, further = own_and_further()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_encoder", required=True)
    parser.add_argument("--text_encoder", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(own)
    encoders = ("--image_encoder", options.image_encoder, "--text_encoder", options.text_encoder)
    share = ("--folder", options.folder, "--val_share", HELD_OUT)
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    print("R@1, R@5, R@10 image to text, then text to image, in percent")
    for seed in range(options.seeds):
        for way in WAYS:
            run = options.output / f"{way}-{seed}"
            how = ("--distillation", way, "--seed", seed, "--output", run)
            command("finetune", *encoders, *share, *how, *further)
            found[way].append(recalls(evaluate(run / "checkpoints" / "last.ckpt", *share, "--split", "held_out")))
            print(f"{way:9}  seed {seed}  {'  '.join(f'{100 * recall:4.1f}' for recall in found[way][-1])}", flush=True)
    for way, rows in found.items():
        means = [statistics.mean(row) for row in rows]
        columns = "  ".join(mean_and_spread(column) for column in zip(*rows, strict=True))
        print(f"{way:9}  {columns}   mean recall {mean_and_spread(means)}")


if __name__ == "__main__":
    main()
