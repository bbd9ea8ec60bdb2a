"""What fine-tuning a trained CLIP gains on new pairs and forgets of the old, and what weights between the two keep.

    python benchmarks/forgetting.py CHECKPOINT new_dir old_dir --output runs/forgetting

Fine-tunes with ``recipes/finetune-clip.yaml``; scores held-out new pairs by retrieval, and the old images, each with
its class in ``STEM.cls``, by zero-shot classification among their captions. Words after ``--`` go to ``train-clip
finetune``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from commands import captions_as_classes, command, own_and_further, show

HELD_OUT = 0.1
WEIGHTS = "[0.25, 0.5, 0.75]"


def main() -> None:
    """Print the tables of ``train-clip merge``."""
    own, further = own_and_further()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(own)
    classes, templates = captions_as_classes(options.old, options.output)
    run = options.output / "run"
    share = ("--folder", options.new, "--val_share", HELD_OUT)
    start = ("--config", "finetune-clip", "--pretrained", options.checkpoint)
    command("finetune", *start, *share, "--output", run, *further)
    others = ("--other_folder", options.old, "--other_classes", classes, "--other_templates", templates)
    merged = ("--weight", WEIGHTS, "--output", options.output / "merged")
    ends = (options.checkpoint, run / "checkpoints" / "last.ckpt")
    show("merge", *ends, *merged, *share, "--split", "held_out", *others)


if __name__ == "__main__":
    main()
