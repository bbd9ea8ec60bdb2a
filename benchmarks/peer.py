"""Training steps of train-clip beside open_clip's: same weights, pictures, captions, batch and precision, in turn.

    python benchmarks/peer.py --peer PEER_ENV/bin/python

PEER_ENV holds the peer: ``python -m venv PEER_ENV && PEER_ENV/bin/pip install open_clip_torch torchvision``. With torch
that sees a GPU it runs all of the paper's presets, both sides plain and compiled, and then batches of 32,768 pairs in
micro-batches (ours only); on a CPU the recipe for emoji, ViT-B/32 and RN50. ``--cases`` picks others. Where the two
environments hold different versions of torch, ``--ours PEER_ENV/bin/python`` gives both the same, once that environment
has what train-clip needs.

Each side is a process of its own. They take turns of a few steps, round after round, so that both meet the same noise;
a ratio is taken within a round. Before the clock starts, both must have equally many parameters, the same loss on the
same weights in float32 (32 pairs, to 10⁻⁴), and nearly the same loss of the first step. What is printed:

    step, pairs/s   median over the rounds
    × peer          the peer's time over ours within a round, the peer plain: median (least to most); then compiled
    processor       the same of seconds of processor time, which other work on the machine disturbs less
    memory          peak (before the first step): resident size on a CPU, the allocator's on a GPU
    TFLOPs          of a step with captions of 77 tokens (with rows as long as ours are); where the device's dense peak
                    is known, the share of it that each side reaches, of both
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_cases import GROUPS, Case
from peer_side import Failed, Side, require_equal_work, start
from peer_table import HEAD, description, paces, rows


def main() -> None:
    """Run the cases and print a table."""
    options = read_options()
    blocks, failed = [], []
    for case in chosen_cases(options):
        try:
            with tempfile.TemporaryDirectory() as folder:
                blocks.append((case, run_case(case, options, Path(folder))))
            print("\n".join(rows(*blocks[-1])), file=sys.stderr, flush=True)
        except Failed as error:
            failed.append(f"- {case.name} failed. {error}")
            print(failed[-1], file=sys.stderr, flush=True)
    print(HEAD)
    for block in blocks:
        print("\n".join(rows(*block)))
    print()
    for case, sides in blocks:
        print(description(case, sides, options.ours))
    print(*paces(blocks), *failed, sep="\n")
    sys.exit(len(failed) > 0)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Training steps of train-clip beside open_clip's.")
    parser.add_argument("--peer", help="the Python of an environment with open_clip_torch and torchvision")
    parser.add_argument("--ours", default=sys.executable, help="the Python that train-clip runs in; this one")
    parser.add_argument("--cases", nargs="+", help=f"{', '.join(GROUPS)}, or names of cases; by device if left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in a round, in place of the case's")
    parser.add_argument("--batch", type=int, help="pairs of a step, in place of the case's")
    parser.add_argument("--words", type=int, nargs=2, help="fewest and most words of a caption; 75 75 fills 77 tokens")
    parser.add_argument("--folder", help="pairs in place of generated ones, for every case")
    parser.add_argument("--threads", type=int, help="of each process; the machine's cores if left out")
    parser.add_argument("--only_default", action="store_true", help="leave out the compiled modes")
    return parser.parse_args()


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for, with what the command line changes of them.

    Raises:
        SystemExit: an unknown name, or no peer where a case needs one.
    """
    known = {case.name: [case] for group in GROUPS.values() for case in group}
    known |= {name: list(group) for name, group in GROUPS.items()}
    names = options.cases or (["gpu", "large"] if has_gpu(options.ours) else ["cpu"])
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"--cases {' '.join(unknown)}: unknown; expected {', '.join(known)}.")
    told = {"steps": options.steps, "batch": options.batch, "words": options.words, "folder": options.folder}
    changes: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    if options.only_default:
        changes["compiled"] = False
    cases = [replace(case, **changes) for name in names for case in known[name]]
    if options.peer is None and any(case.peer for case in cases):
        sys.exit("--peer is missing; expected the Python of an environment with open_clip_torch and torchvision.")
    return cases


def has_gpu(python: str) -> bool:
    """Whether torch sees one; asked of a process of its own, to keep this one small."""
    code = "import torch; print(torch.cuda.is_available())"
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip() == "True"


def run_case(case: Case, options: argparse.Namespace, folder: Path) -> list[Side]:
    """Start the sides one after the other, hold them against each other, and let them take turns.

    Args:
        case: what.
        options: of the command line.
        folder: for weights and logs.
    """
    sides: list[Side] = []
    pythons = {"train-clip": options.ours, "open_clip": options.peer}
    try:
        for mode in ("default", "compiled") if case.compiled else ("default",):
            for who in ("train-clip", "open_clip") if case.peer else ("train-clip",):
                print(f"{case.name}: starts {who}, {mode}", file=sys.stderr, flush=True)
                sides.append(start(who, mode, case, pythons[who], folder, options.threads))
                sides[-1].facts = sides[-1].hear()
        require_equal_work(sides)
        for _ in range(options.rounds if case.peer else 1):
            for side in sides:
                side.go()
    finally:
        for side in sides:
            side.end()
    return sides


if __name__ == "__main__":
    main()
