"""Fixes the splits that recipes are chosen and reported on: three tables each, the same on any machine.

    python benchmarks/recipes/splits.py emoji emoji_dir
    python benchmarks/recipes/splits.py cifar cifar_dir

``emoji``: pictures whose third caption line ends with its subcategory. Whole subcategories make up report.csv, so that
nothing of them is met in training; apart from them a random tenth is choose.csv. ``cifar``: 2,000 pairs are held out,
half of them in each table. Settings are chosen on choose.csv; docs/recipes.md tells both.

Who comes first is decided by a digest of the names, before anything was trained.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

TENTH = 0.1
HELD_OUT = 2000  # CIFAR pairs


def main() -> None:
    """Write train.csv, choose.csv and report.csv into the folder of the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("emoji", "cifar"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    captions = sorted(options.folder.glob("*.txt"))
    choose, report = of_emoji(captions) if options.kind == "emoji" else of_cifar(captions)
    train = [file for file in captions if file not in {*choose, *report}]
    for name, files in (("train", train), ("choose", choose), ("report", report)):
        write(options.folder / f"{name}.csv", files)
        print(f"{name}.csv: {len(files):,} pairs")


def of_emoji(captions: list[Path]) -> tuple[list[Path], list[Path]]:
    """A random tenth, and whole subcategories that make up about a tenth besides."""
    members: dict[str, list[Path]] = {}
    for file in captions:
        members.setdefault(subcategory(file), []).append(file)
    report: list[Path] = []
    for name in by_digest(members):
        if len(report) + len(members[name]) <= TENTH * 1.1 * len(captions):
            report += members[name]
    rest = [file for file in captions if file not in set(report)]
    chosen = set(by_digest(file.stem for file in rest)[: round(TENTH * len(captions))])
    return [file for file in rest if file.stem in chosen], sorted(report)


def of_cifar(captions: list[Path]) -> tuple[list[Path], list[Path]]:
    """Two halves of the pairs that are held out."""
    stems = by_digest(file.stem for file in captions)[:HELD_OUT]
    halves = set(stems[: HELD_OUT // 2]), set(stems[HELD_OUT // 2 :])
    return [f for f in captions if f.stem in halves[0]], [f for f in captions if f.stem in halves[1]]


def subcategory(file: Path) -> str:
    """What stands behind the last comma."""
    return file.read_text(encoding="utf-8").rstrip().rsplit(", ", 1)[-1]


def by_digest(names: Iterable[str]) -> list[str]:
    """Names in an order that nobody chose."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode()).digest())


def write(table: Path, files: Iterable[Path]) -> None:
    """A row for each line of each caption file."""
    images = {file.stem: file.name for file in table.parent.iterdir() if file.suffix in (".png", ".jpg")}
    with table.open("w", encoding="utf-8", newline="") as target:
        rows = csv.writer(target)
        rows.writerow(("image", "caption"))
        for file in files:
            rows.writerows((images[file.stem], line) for line in file.read_text(encoding="utf-8").splitlines() if line)


if __name__ == "__main__":
    main()
