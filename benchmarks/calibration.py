"""Whether `train-clip calibrate` keeps its promise on real images: fitted on many halves, checked on the others.

    python benchmarks/calibration.py CHECKPOINT --folder data_dir --classes classes.txt --split held_out --precision 0.8

Options are those of ``train-clip calibrate``; ``--seed`` is the number of divisions into halves.
"""

from __future__ import annotations

import sys

import numpy as np

from train_clip import cli
from train_clip.checkpoints.found import find_weights
from train_clip.commands.evaluate import load_for_scoring
from train_clip.commands.progress import with_progress
from train_clip.evaluation.collect import collect, find
from train_clip.probes.calibrate import check, fit, halves, sides


def main() -> None:
    """Print a row for each division, and how many kept the promise."""
    _, call = cli.parse("calibrate", sys.argv[1:])
    checkpoint, options, weights = call.args
    model = load_for_scoring(find_weights(checkpoint, weights, options.backbone), options.device)
    both = sides(collect(model.model, model.tokens, find(options)[0], options, with_progress))
    scale = model.model.logit_scale.exp().item()
    found = []
    for seed in range(options.seed or 20):
        fitted, others = halves(both, seed, every=options.classes is not None)
        told = check(others, calibration := fit(fitted, options.precision), scale)
        row = f"| {seed} | {told['ece_before']:.2%} | {told['ece_after']:.2%} |"
        if calibration.threshold is not None:
            (low, high), recall = told["precision"]["interval"], told["recall"]["value"]
            found.append((told["precision"]["value"], recall, high >= options.precision))
            row += f" {calibration.threshold:.3f} | {found[-1][0]:.1%} | {low:.1%} to {high:.1%} | {recall:.1%} |"
        print(row)
    if found:
        precision, recall, covered = np.array(found).T
        kept = int((precision >= options.precision).sum())
        print(
            f"Precision {options.precision:.0%} promised in {len(found)} divisions, kept on the other half in {kept}, "
            f"within its interval in {int(covered.sum())}; on average {precision.mean():.1%}, recall "
            f"{recall.mean():.1%}."
        )


if __name__ == "__main__":
    main()
