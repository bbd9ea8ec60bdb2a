"""Whether `evaluate --calibrate` keeps its promise on real images: fitted on many halves, checked on the others.

    python benchmarks/calibration.py CHECKPOINT --folder data_dir --classes classes.txt --min_precision 0.8

Options are those of ``train-clip evaluate``.
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

DIVISIONS = 20  # into halves


def main() -> None:
    """Print a row for each division, and how many kept the promise."""
    _, call = cli.parse("evaluate", sys.argv[1:])
    checkpoint, options, weights, *_ = call.args
    model = load_for_scoring(find_weights(checkpoint, weights, options.backbone), options.device)
    both = sides(collect(model.model, model.tokens, find(options)[0], options, with_progress))
    scale = model.model.logit_scale.exp().item()
    found = []
    for seed in range(DIVISIONS):
        fitted, others = halves(both, options.classes is not None, seed)
        told = check(others, calibration := fit(fitted, options.min_precision), scale)
        row = f"| {seed} | {told['ece_before']:.2%} | {told['ece_after']:.2%} |"
        if calibration.threshold is not None:
            (low, high), recall = told["precision"]["interval"], told["recall"]["value"]
            found.append((told["precision"]["value"], recall, high >= options.min_precision))
            row += f" {calibration.threshold:.3f} | {found[-1][0]:.1%} | {low:.1%} to {high:.1%} | {recall:.1%} |"
        print(row)
    if found:
        precision, recall, covered = np.array(found).T
        kept = int((precision >= options.min_precision).sum())
        print(
            f"Precision {options.min_precision:.0%} promised in {len(found)} of {DIVISIONS} divisions, kept on the "
            f"other half in {kept}, within its interval in {int(covered.sum())}; on average {precision.mean():.1%}, "
            f"recall {recall.mean():.1%}."
        )


if __name__ == "__main__":
    main()
