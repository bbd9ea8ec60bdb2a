"""Trains the rows of an experiment and judges them on a split: a table, mean ± standard deviation over seeds.

    python benchmarks/recipes/run.py emoji rates emoji_dir --output runs/recipes --seeds 3

``splits.py`` has written the tables into the folder. Rows are trained on train.csv and judged on choose.csv, or with
``--report`` on report.csv, by the state that the run ended in. Runs that are there already are read, those that were
stopped begin anew, and those that other words have left are refused. ``--jobs 2`` trains two at a time. Words after
``--`` go to ``train-clip train``, such as ``--precision bf16-mixed``. Rows of open_clip are trained by its own program,
in the environment that ``--peer ENV/bin/python`` names (``open_clip_torch[training]``, timm). Times are of processor
time, next to the first row's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from once import run_once
from peer import Peer
from rows import DATA, EXPERIMENTS, Data, Theirs

sys.path.append(str(Path(__file__).parents[1]))
from commands import captions_as_classes, evaluate, mean_and_spread, own_and_further, recalls

PLAIN = str.maketrans(" ,.", "_-_", "'")  # of a row's name, what a folder is called


class Result(NamedTuple):
    """What a run came to.

    Args:
        score: zero-shot accuracy, or the mean of the six recalls.
        recalls: R@1, R@5, R@10 image to text, or the accuracy alone.
        seconds: of processor time.
    """

    score: float
    recalls: list[float]
    seconds: float


def main() -> None:
    """Train what is not there yet, then print the table."""
    own, further = own_and_further()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args(own)
    data, table = DATA[options.data], "report" if options.report else "choose"
    rows = EXPERIMENTS[options.experiment]
    kinds = captions_as_classes(options.folder, options.output) if data.classes else None
    theirs = any(isinstance(row, Theirs) for row in rows.values())
    if theirs and options.peer is None:
        parser.error(f"{options.experiment} has rows of open_clip: give --peer ENV/bin/python")
    if theirs and (data.classes or "--model_name" in further):
        parser.error(f"{options.experiment} has rows of open_clip, whose lengths and model are for the emoji alone")
    peer = Peer.of(options.peer, options.folder, options.output / "peer", data.model) if theirs else None

    def result(name: str, seed: int) -> Result:
        """Train and judge one run."""
        run, row = options.output / options.data / f"{name.translate(PLAIN)}-{seed}", rows[name]
        if isinstance(row, Theirs):
            assert peer is not None
            state, seconds = peer.train(run, row.samples, row.warmup, seed, row.words)
            reading: tuple[Any, ...] = ("--model_name", data.model, "--activation", "quick_gelu")
        else:
            where = ("--pairs", options.folder / "train.csv", "--val_pairs", options.folder / "choose.csv")
            model = () if "--model_name" in further else ("--model_name", data.model)
            words = (*where, *model, *data.words, "--keep", 1, "--seed", seed, *further, *row.split())
            # Of a run with a running mean it is the mean that is judged.
            state, reading = run / ("ema" if "--ema" in words else "checkpoints") / "last.ckpt", ()
            call = map(str, (sys.executable, "-m", "train_clip.cli", "train", *words, "--output", run))
            seconds = run_once(run, list(call))
        found = judge(run, state, options.folder / f"{table}.csv", data, kinds, reading)
        print(f"{name:40} seed {seed}  {100 * found[0]:.1f}%  {seconds:.0f} s", file=sys.stderr, flush=True)
        return Result(*found, seconds)

    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {(name, seed): pool.submit(result, name, seed) for seed in range(options.seeds) for name in rows}
        try:
            show(table, {name: [jobs[name, seed].result() for seed in range(options.seeds)] for name in rows})
        finally:
            pool.shutdown(cancel_futures=True)


def judge(
    run: Path, state: Path, table: Path, data: Data, kinds: tuple[Path, Path] | None, reading: tuple[Any, ...]
) -> tuple[float, list[float]]:
    """The score of a run's last state, and what it is the mean of."""
    scores = run / f"{table.stem}.json"
    words = () if kinds is None else ("--classes", kinds[0], "--templates", kinds[1])
    if not scores.exists():
        evaluate(state, "--pairs", table, *words, *reading, scores=scores)
    found = json.loads(scores.read_text(encoding="utf-8"))
    if data.classes:
        return found["zero_shot"]["top1"], [found["zero_shot"]["top1"]]
    both = recalls(found)
    return statistics.mean(both), both[:3]


def show(table: str, results: dict[str, list[Result]]) -> None:
    """A row of the table for each of the experiment."""
    first = next(iter(results.values()))
    print(f"\n| {table}.csv | score, % | against the first | R@1/5/10, or accuracy | time |\n|---|---|---|---|---|")
    for name, found in results.items():
        against = [one.score - other.score for one, other in zip(found, first, strict=True)]
        columns = zip(*(one.recalls for one in found), strict=True)
        time = statistics.median(one.seconds for one in found) / statistics.median(one.seconds for one in first)
        print(
            f"| {name} | {mean_and_spread([one.score for one in found])} | {mean_and_spread(against)} | "
            f"{' / '.join(f'{100 * statistics.mean(column):.1f}' for column in columns)} | {time:.2f} |"
        )


if __name__ == "__main__":
    main()
