"""Draws what rows came to by epochs: the mean over seeds, and one standard deviation around it.

    python benchmarks/recipes/curves.py runs/recipes/emoji paper muon --to docs/images/recipes_emoji.png

Reads what ``run.py`` has trained. The figure is that of the split of choose.csv; a model's average has its own,
``--figure val_ema/mean_recall``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from run import PLAIN


def main() -> None:
    """Draw a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--figure", default="val/mean_recall")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in options.rows:
        runs = sorted(options.runs.glob(f"{name.translate(PLAIN)}-[0-9]"))
        values = np.array([read(run, options.figure) for run in runs])
        epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
        spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
        (line,) = axes.plot(epochs, mean, label=f"{name} ({len(runs)} seeds)")
        axes.fill_between(epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel="mean recall on the held-out pairs, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.to, dpi=120)
    print(options.to)


def read(run: Path, figure: str) -> NDArray[np.float64]:
    """A figure in percent, one an epoch."""
    with (run / "logs" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return np.array([100 * float(row[figure]) for row in csv.DictReader(file) if row.get(figure)])


if __name__ == "__main__":
    main()
