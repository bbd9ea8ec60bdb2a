"""Visual prompts beside full fine-tuning: which rate, what each learns at equal steps, and what each costs.

    python benchmarks/prompts.py CHECKPOINT data_dir --output runs/prompts

``data_dir`` holds images with their class in ``STEM.cls``. They are divided into pairs to train on, to choose rates by,
and to report on (``train-clip data split``). The score is zero-shot accuracy among the captions. Words after ``--`` go
to both verbs.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from commands import captions_as_classes, command, evaluate, own_and_further

BATCH, EPOCHS, MAX_PER_CLASS = 64, 3, 300
HELD_OUT = ("--val_share", 0.2, "--test_share", 0.2, "--max_per_class", MAX_PER_CLASS)
# For prompts a part of the paper's grid of base rates for 256 pairs (VPT, appendix A, table 6), with SGD; AdamW for all
# weights.
WAYS = {
    "deep prompts": ("prompt-tune", ("--prompt_kind", "deep"), (2.5, 10.0, 25.0, 50.0)),
    "shallow prompts": ("prompt-tune", ("--prompt_kind", "shallow"), (2.5, 10.0, 25.0, 50.0)),
    "all weights": ("finetune", (), (1e-4, 3e-4, 1e-3)),
}


class Run(NamedTuple):
    """What a run scores, and what it took."""

    chosen_by: float
    reported: float
    seconds_a_step: float
    peak_mib: float
    checkpoint: Path


def main() -> None:
    """Print each rate's score where rates are chosen, then a row a way of tuning."""
    own, further = own_and_further()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(own)
    tables = options.output / "split"
    command("data", "split", options.folder, "--output", tables, *HELD_OUT)
    classes, templates = captions_as_classes(options.folder, options.output)
    among = ("--classes", classes, "--templates", templates)
    rows = [f"| before | | {_score(options.checkpoint, tables / 'test.csv', among, options.output):.1%} | | | | |"]
    for name, (verb, words, rates) in WAYS.items():
        runs = {}
        for rate in rates:
            output = options.output / f"{name.replace(' ', '-')}-{rate:g}"
            call = (verb, "--pretrained", options.checkpoint, "--pairs", tables / "train.csv", "--val_share", 0)
            peak = rate * BATCH / 256 if verb == "prompt-tune" else rate
            length = ("--batch_size", BATCH, "--epochs", EPOCHS, "--learning_rate", peak, "--output", output)
            runs[rate] = _run((*call, *length, *words, *further), output, tables, among)
            print(f"{name} at {rate:g}: {runs[rate].chosen_by:.1%}", flush=True)
        best = max(runs, key=lambda rate: runs[rate].chosen_by)
        rows.append(_row(name, best, runs[best]))
    print(
        "| trained | rate | zero-shot | numbers trained | s a step | peak MiB | checkpoint, MiB |\n" + "|---" * 7 + "|"
    )
    print("\n".join(rows))


def _run(words: tuple[Any, ...], output: Path, tables: Path, among: tuple[Any, ...]) -> Run:
    """Train in a process of its own, whose peak the system tells."""
    with (output.parent / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "train_clip.cli", *map(str, words)], stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))}\nfailed: see {log.name}")
    with (output / "logs" / "metrics.csv").open() as file:
        rates = [float(row["train/pairs_per_second"]) for row in csv.DictReader(file) if row["train/pairs_per_second"]]
    checkpoint = output / "checkpoints" / "last.ckpt"
    scores = (_score(checkpoint, tables / f"{part}.csv", among, output) for part in ("val", "test"))
    return Run(*scores, BATCH / statistics.median(rates), usage.ru_maxrss / 2**10, checkpoint)


def _score(checkpoint: Path, table: Path, among: tuple[Any, ...], output: Path) -> float:
    found = evaluate(checkpoint, "--pairs", table, *among, scores=output / f"{table.stem}.json")
    return found["zero_shot"]["top1"]


def _row(name: str, rate: float, run: Run) -> str:
    from train_clip import load
    from train_clip.checkpoints.own import read_checkpoint

    whole = sum(parameter.numel() for parameter in load(run.checkpoint).model.parameters())
    state = read_checkpoint(run.checkpoint)["optimizer_states"][0]["state"]
    trained = sum(next(iter(moments.values())).numel() for moments in map(_tensors, state.values()))
    size = run.checkpoint.stat().st_size / 2**20
    return (
        f"| {name} | {rate:g} | {run.reported:.1%} | {trained:,} ({trained / whole:.2%}) | {run.seconds_a_step:.2f} | "
        f"{run.peak_mib:,.0f} | {size:.2f} |"
    )


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The statistics of one parameter that have its shape."""
    return {name: value for name, value in state.items() if name in ("momentum_buffer", "exp_avg")}


if __name__ == "__main__":
    main()
