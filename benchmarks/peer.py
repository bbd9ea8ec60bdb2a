"""Training steps of train-clip beside open_clip's: same weights, pictures, captions, batch and precision, in turn.

    python benchmarks/peer.py --peer PEER_ENV/bin/python

PEER_ENV holds the peer: ``python -m venv PEER_ENV && PEER_ENV/bin/pip install open_clip_torch torchvision``. With torch
that sees a GPU it runs all of the paper's presets, both sides plain and compiled, and then batches of 32,768 pairs in
micro-batches (ours only); on a CPU the recipe for emoji, ViT-B/32 and RN50. ``--cases`` picks others. Where the two
environments hold different versions of torch, ``--ours PEER_ENV/bin/python`` gives both the same, once that environment
has what train-clip needs.

Each side is a process of its own. They take turns of a few steps, round after round, so that both meet the same noise;
a ratio is taken within a round. Before the clock starts, both must have equally many parameters, the same loss on the
same weights in float32 (32 pairs, 10⁻³), and nearly the same loss of the first step. What is printed:

    pairs/s       median over the rounds
    x peer        our pace over the peer's in the same mode of the same round: median (least to most)
    processor     the same of seconds of processor time, which other work on the machine disturbs less
    memory        GiB, peak (before the first step): resident size on a CPU, the allocator's on a GPU
    FLOPs         of a step, captions of 77 tokens (as long as ours really are); MFU from both where the peak is known
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peer_cases import GROUPS, Case, to_json

HERE = Path(__file__).resolve().parent
GIB = 2**30
SAME_LOSS = 1e-3  # float32, eval mode
SAME_STEP = 0.05  # the case's precision, of a loss around 3 to 6
HEAD = (
    "| case | side | step, ms | pairs/s | × peer | × peer, compiled | processor, × peer | memory, GiB | first loss |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass
class Side:
    """One process that trains, and what it said.

    Args:
        who: ``train-clip`` or ``open_clip``.
        mode: ``default`` or ``compiled``.
        process: waits for a line between rounds.
        log: where its standard error goes.
        facts: what it said before the first round.
        rounds: seconds, processor seconds and peak memory of each.
    """

    who: str
    mode: str
    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def hear(self) -> dict[str, Any]:
        """Its next line for this driver.

        Raises:
            SystemExit: it ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        sys.exit(f"{self.who}, {self.mode}: ended with {self.process.wait()}.\n{self.log.read_text()[-3000:]}")

    def go(self) -> None:
        """Let it train a round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.hear())

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def median(self, name: str) -> float:
        """Over the rounds."""
        return statistics.median(found[name] for found in self.rounds)


def main() -> None:
    """Run the cases and print a table."""
    options = read_options()
    blocks = []
    for case in chosen_cases(options):
        with tempfile.TemporaryDirectory() as folder:
            blocks.append((case, run_case(case, options, Path(folder))))
        print(f"{case.name}: done\n" + "\n".join(rows(*blocks[-1])), flush=True)
    print("\n" + HEAD)
    for block in blocks:
        print("\n".join(rows(*block)))
    print()
    for case, sides in blocks:
        print(description(case, sides, options.ours))
    print(*paces(blocks), sep="\n")


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
    for mode in ("default", "compiled") if case.compiled else ("default",):
        for who in ("train-clip", "open_clip") if case.peer else ("train-clip",):
            print(f"{case.name}: starts {who}, {mode}", file=sys.stderr, flush=True)
            side = start(who, mode, case, options, folder)
            side.facts = side.hear()
            sides.append(side)
    require_equal_work(sides)
    for _ in range(options.rounds if case.peer else 1):
        for side in sides:
            side.go()
    for side in sides:
        side.end()
    return sides


def start(who: str, mode: str, case: Case, options: argparse.Namespace, folder: Path) -> Side:
    """Start a side's process."""
    python, script = (options.ours, "peer_ours.py") if who == "train-clip" else (options.peer, "peer_theirs.py")
    environment = dict(os.environ)
    if who == "train-clip":
        environment["PYTHONPATH"] = str(HERE.parent)
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    log = folder / f"{who}-{mode}.log"
    command = [python, str(HERE / script), to_json(case), str(folder / "weights.pt"), mode]
    pipe = subprocess.PIPE
    with log.open("w") as errors:
        return Side(
            who,
            mode,
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment),
            log,
        )


def require_equal_work(sides: list[Side]) -> None:
    """Refuse to compare what is not equal.

    Raises:
        SystemExit: another number of parameters, or another loss.
    """
    first = sides[0]
    for side in sides[1:]:
        for name, apart in (("parameters", 0), ("checked_loss", SAME_LOSS), ("first_loss", SAME_STEP)):
            ours, theirs = first.facts[name], side.facts[name]
            if not abs(ours - theirs) <= apart:
                sys.exit(f"{name}: {ours} of {first.who}, {theirs} of {side.who} ({side.mode}); expected the same.")


def rows(case: Case, sides: list[Side]) -> list[str]:
    """The case's rows of the table."""
    peers = {side.mode: side for side in sides if side.who == "open_clip"}
    found = []
    for side in sides:
        step, before, peak = side.median("seconds"), side.facts["before"], side.rounds[-1]["peak"]
        ours = side.who == "train-clip"
        found.append(
            f"| {case.name} | {side.who}, {side.mode} | {step * 1000:,.0f} | {case.batch / step:,.1f} "
            f"| {ratio(side, peers.get('default')) if ours else ''} "
            f"| {ratio(side, peers.get('compiled')) if ours else ''} "
            f"| {ratio(side, peers.get('default'), 'processor') if ours else ''} "
            f"| {peak / GIB:.2f} ({before / GIB:.2f}) | {side.facts['first_loss']:.4f} |"
        )
    return found


def ratio(side: Side, peer: Side | None, name: str = "seconds") -> str:
    """How many times the peer's cost ours is: median over the rounds, with the least and the most."""
    if peer is None:
        return ""
    values = [theirs[name] / ours[name] for ours, theirs in zip(side.rounds, peer.rounds, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def description(case: Case, sides: list[Side], python: str) -> str:
    """A line on what was computed."""
    command = [python, str(HERE / "peer_flops.py"), to_json(case), str(sides[0].facts["tokens"])]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    flops = json.loads(ended.stdout.splitlines()[-1])
    versions = " and ".join(dict.fromkeys(f"torch {side.facts['torch']} ({side.who})" for side in sides))
    line = (
        f"- {case.name}: {case.model}, {sides[0].facts['parameters']:,} parameters, batch {case.batch:,}, "
        f"{case.precision}, captions {case.captions} (rows of {sides[0].facts['tokens']} tokens, the peer's "
        f"{case_context(sides)}){f', micro-batches of {case.micro}' if case.micro else ''}; "
        f"{flops['full'] / 1e12:.2f} TFLOPs a step ({flops['real'] / 1e12:.2f}); {flops['device']}; {versions}"
    )
    if flops["available"]:
        shares = (
            f"{side.who}, {side.mode} {100 * flops['full'] / side.median('seconds') / flops['available']:.1f}% "
            f"({100 * flops['real'] / side.median('seconds') / flops['available']:.1f}%)"
            for side in sides
        )
        line += f"; of {flops['available'] / 1e12:,.0f} TFLOPs/s: {', '.join(shares)}"
    return line


def case_context(sides: list[Side]) -> int | str:
    """Tokens of the peer's rows."""
    return next((side.facts["tokens"] for side in sides if side.who == "open_clip"), "none")


def paces(blocks: list[tuple[Case, list[Side]]]) -> list[str]:
    """Of the cases without a peer: the pace of each size of micro-batch against the model's fastest."""
    alone = [(case, sides[0].median("seconds")) for case, sides in blocks if not case.peer]
    fastest = {case.model: min(step for other, step in alone if other.model == case.model) for case, _ in alone}
    return [
        f"- {case.model}, micro-batches of {case.micro:,}: {100 * fastest[case.model] / step:.0f}% of the fastest"
        for case, step in alone
    ]


if __name__ == "__main__":
    main()
