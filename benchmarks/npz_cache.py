"""What arrays in npz/ gain over decoding JPEGs, and what they take on disk.

    python benchmarks/npz_cache.py FOLDER [--image_size 224] [--rounds 5]

The folder of pairs is copied, ``train-clip data npz`` makes arrays of the copy, and one process draws every pair's
training crop (with its caption line, without tokens or a model) from the images and from the arrays in turn. Rates are
of the process's own time, which other processes do not change, the median of the rounds, files in the page cache.
Deflated arrays are what ``numpy.savez_compressed`` writes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from train_clip.data.folder import scan_folder
from train_clip.data.pairs import Pair
from train_clip.data.samples import TrainingPairs
from train_clip.data_tools.npz import NpzOptions, data_npz


def main() -> None:
    """Copy, make, draw in turn, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pairs"
        shutil.copytree(options.folder, folder)
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        folder.chmod(0o755)
        with contextlib.redirect_stdout(io.StringIO()):
            data_npz(folder, options=NpzOptions(options.image_size))
        kinds = prepare(folder)
        print(f"{len(kinds['JPEG'])} pairs, {options.image_size} pixels\n")
        print(
            "| crop | JPEG, images/s | arrays, images/s | ratio | arrays, deflated, images/s |\n|---|---|---|---|---|"
        )
        for name, ratio in (("paper's", None), ("`--resize_ratio 0.75`", 0.75)):
            ways = {kind: TrainingPairs(pairs, options.image_size, ratio) for kind, pairs in kinds.items()}
            found = rates(ways, options.rounds)
            jpeg, stored, deflated = (found[kind] for kind in kinds)
            print(f"| {name} | {jpeg:.0f} | {stored:.0f} | {stored / jpeg:.1f} | {deflated:.0f} |")
        sizes = [sum(Path(pair.pixels).stat().st_size for pair in pairs) / 2**20 for pairs in kinds.values()]
        print("| on disk, MiB | {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(*sizes[:2], sizes[1] / sizes[0], sizes[2]))


def prepare(folder: Path) -> dict[str, list[Pair]]:
    """The pairs read from images, from arrays, and from arrays that are deflated."""
    cached = list(scan_folder(folder).require_pairs().pairs)
    deflated = []
    for pair in cached:
        array = Path(pair.cache).with_suffix(".deflated.npz")
        np.savez_compressed(array, data=np.load(pair.cache)["data"])
        deflated.append(Pair(pair.image, pair.caption, cache=str(array)))
    return {"JPEG": [Pair(pair.image, pair.caption) for pair in cached], "arrays": cached, "deflated": deflated}


def rates(data: dict[str, TrainingPairs], rounds: int) -> dict[str, float]:
    """Samples a second of each, one after the other in every round, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in data}
    for epoch in range(rounds + 1):
        for name, pairs in data.items():
            started = time.process_time()
            for index in range(len(pairs)):
                pairs[epoch, index]
            taken[name].append(len(pairs) / (time.process_time() - started))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


if __name__ == "__main__":
    main()
