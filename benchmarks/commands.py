"""Runs the commands that people type, each in a process of its own, and brings back what they found."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def own_and_further() -> tuple[list[str], list[str]]:
    """The words of this process's command line before and behind ``--``."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def command(*words: Any) -> None:
    """Run ``train-clip`` with these words.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    call = [sys.executable, "-m", "train_clip.cli", *map(str, words)]
    ended = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(call)}\n{ended.stdout[-3000:]}")


def show(*words: Any) -> None:
    """Run ``train-clip`` with these words and let it print."""
    subprocess.run([sys.executable, "-m", "train_clip.cli", *map(str, words)], check=True)


def captions_as_classes(folder: Path, target: Path) -> tuple[Path, Path]:
    """Write the different captions of a folder as class names, and a template that is the name alone.

    Args:
        folder: images whose caption's place in the list, counted from 0, stands in ``STEM.cls``.
        target: where to write.
    """
    target.mkdir(parents=True, exist_ok=True)
    classes, templates = target / "classes.txt", target / "templates.txt"
    captions = {int(file.read_text()): file.with_suffix(".txt").read_text() for file in folder.rglob("*.cls")}
    classes.write_text("".join(captions[place].strip() + "\n" for place in sorted(captions)), encoding="utf-8")
    templates.write_text("{}\n", encoding="utf-8")
    return classes, templates


def evaluate(checkpoint: Path, *words: Any, scores: Path | None = None) -> dict[str, Any]:
    """The figures of ``train-clip evaluate``, as its ``--json`` has them.

    Args:
        checkpoint: whatever that takes.
        words: its options.
        scores: where to keep them, if not beside the checkpoint.
    """
    found = scores or checkpoint.with_suffix(".json")
    command("evaluate", checkpoint, *words, "--json", found)
    return json.loads(found.read_text(encoding="utf-8"))


def recalls(scores: dict[str, Any]) -> list[float]:
    """R@1, R@5, R@10 image to text, then text to image."""
    both = (scores["retrieval"]["image_to_text"], scores["retrieval"]["text_to_image"])
    return [direction[k] for direction in both for k in ("1", "5", "10")]


def mean_and_spread(values: Sequence[float]) -> str:
    """Percentages over seeds: mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):5.1f} ± {100 * spread:3.1f}"
