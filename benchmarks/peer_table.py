"""What ``peer.py`` prints of what its sides found."""

from __future__ import annotations

import json
import os
import statistics
import subprocess

from peer_cases import Case, to_json
from peer_side import HERE, Side

GIB = 2**30
HEAD = (
    "| case | side | step, ms | pairs/s | × peer | × peer, compiled | processor, × peer | memory, GiB | first loss |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


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
        f"{loss_apart(sides)}{flops['full'] / 1e12:.2f} TFLOPs a step ({flops['real'] / 1e12:.2f}); "
        f"{flops['device']}; {versions}"
    )
    if flops["available"]:
        shares = (
            f"{side.who}, {side.mode} {100 * flops['full'] / side.median('seconds') / flops['available']:.1f}% "
            f"({100 * flops['real'] / side.median('seconds') / flops['available']:.1f}%)"
            for side in sides
        )
        line += f"; of {flops['available'] / 1e12:,.0f} TFLOPs/s: {', '.join(shares)}"
    return line


def loss_apart(sides: list[Side]) -> str:
    """How far the two losses in float32 are apart."""
    losses = [side.facts["checked_loss"] for side in sides]
    return "" if losses[0] is None else f"losses in float32 {max(losses) - min(losses):.0e} apart; "


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
