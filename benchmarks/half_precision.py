r"""Training curves with float32 weights and moments, with bfloat16 moments, and with a bfloat16 text tower besides.

    python benchmarks/half_precision.py data_dir --output runs/half --seeds 5 --epochs 40

Trains a small CLIP from scratch (the recipe ``cpu``) in each way from the same seeds, and prints by epochs the loss and
the mean recall on the held-out pairs, mean ± standard deviation over the seeds, then what each way differs from float32
by at the end, seed by seed, and the bytes of weights and moments as its checkpoint holds them. A run that is there
already is gone on with, or read. Words after ``--`` go to ``train-clip train``, such as ``--precision bf16-mixed``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from commands import command, own_and_further

MOMENTS = ("--adam_statistics", "bfloat16")
WAYS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "moments": MOMENTS,
    "moments, text weights": (*MOMENTS, "--half_weights", "text"),
}
FIGURES = {"loss": "val/loss", "mean recall, %": "val/mean_recall"}
SHOWN = 8  # epochs of a curve, evenly spaced, the last among them

Curve = list[tuple[float, float]]  # by epochs, loss and mean recall in percent


def main() -> None:
    """Train, then print the curves, the differences and the sizes."""
    own, further = own_and_further()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args(own)
    curves: dict[str, list[Curve]] = {way: [] for way in WAYS}
    sizes: dict[str, str] = {}
    for seed in range(options.seeds):
        for way, words in WAYS.items():
            run = options.output / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
            how = ("--config", "cpu", "--folder", options.folder, "--epochs", options.epochs, "--seed", seed)
            curves[way].append(train(run, options.epochs, *how, *words, *further))
            sizes[way] = size_of(run / "checkpoints" / "last.ckpt")
            loss, recall = curves[way][-1][-1]
            print(f"seed {seed}  {way:22}  loss {loss:.3f}  mean recall {recall:.1f}%", flush=True)
    for place, name in enumerate(FIGURES):
        show(name, place, curves, options.epochs)
    print(f"\n| weights and moments | {' | '.join(WAYS)} |\n|---{'|---' * len(WAYS)}|")
    print(f"| | {' | '.join(sizes[way] for way in WAYS)} |")


def train(run: Path, epochs: int, *words: Any) -> Curve:
    """Train a run that is not there, go on with one that has not ended, and read its curve."""
    if len(curve := read(run)) < epochs:
        there = (run / "checkpoints" / "last.ckpt").exists()
        command("train", *(("--resume", run) if there else (*words, "--output", run)))
        curve = read(run)
    return curve


def read(run: Path) -> Curve:
    """The held-out figures of each epoch so far."""
    metrics = run / "logs" / "metrics.csv"
    if not metrics.exists():
        return []
    with metrics.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    return [(float(row[FIGURES["loss"]]), 100 * float(row[FIGURES["mean recall, %"]])) for row in rows]


def size_of(checkpoint: Path) -> str:
    """Bytes of the model's weights and of the optimizer's moments, and of both for each parameter of the model."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    weights = [value for name, value in state["state_dict"].items() if name.startswith("model.")]
    (optimizer,) = state["optimizer_states"]
    kept = [value for of_one in optimizer["state"].values() for name, value in of_one.items() if "exp_avg" in name]
    total = sum(value.numel() * value.element_size() for value in (*weights, *kept))
    return f"{total / 2**20:.1f} MiB, {total / sum(value.numel() for value in weights):.2f} bytes a parameter"


def show(name: str, place: int, curves: dict[str, list[Curve]], epochs: int) -> None:
    """Print a figure's curves, and the differences from float32 at the end."""
    print(f"\n{name}\n\n| epoch | {' | '.join(curves)} |\n|---{'|---' * len(curves)}|")
    for epoch in sorted({max(1, round(epochs * part / SHOWN)) for part in range(1, SHOWN + 1)}):
        columns = (spread([curve[epoch - 1][place] for curve in of_way]) for of_way in curves.values())
        print(f"| {epoch} | {' | '.join(columns)} |")
    reference = curves["float32"]
    ends = (
        spread([curve[-1][place] - other[-1][place] for curve, other in zip(of_way, reference, strict=True)])
        for of_way in curves.values()
    )
    print(f"| less float32's | {' | '.join(ends)} |")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
