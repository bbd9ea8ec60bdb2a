"""Shards beside the folder that they were written from: scan, first batch, images/s, memory.

python benchmarks/shards.py [--pairs 100000] [--workers 2] [--batches 40]
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from train_clip.training.data_module import TextImageDataModule

BATCH, SIDE, DRAWN = 256, 256, 200


def main() -> None:
    """Print a row a source, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description="What shards cost and save.")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, shards, bare = (Path(name, one) for one in ("folder", "shards", "bare"))
        write(folder, arguments.pairs)
        begun = time.monotonic()
        command = [sys.executable, "-m", "train_clip", "data", "shards", str(folder), "--output", str(shards)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"`train-clip data shards`: {arguments.pairs:,} pairs in {time.monotonic() - begun:.1f} s\n")
        bare.mkdir()
        for shard in shards.glob("*.tar"):
            os.link(shard, bare / shard.name)
        print("| source | scan | first batch after | images/s | peak memory | of a loader process |")
        print("|---|---|---|---|---|---|")
        environment = os.environ | {"XDG_CACHE_HOME": str(Path(name, "cache"))}
        for title, kind, source in (
            ("folder", "folder", folder),
            ("shards", "shards", shards),
            ("shards without indices, the first time", "shards", bare),
            ("the second time", "shards", bare),
        ):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind, str(source)]
            row = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            print(f"| {title} | {row.splitlines()[-1]} |", flush=True)


def write(folder: Path, number: int) -> None:
    """Pairs of a few pictures, each with bytes of its own behind it."""
    rng, contents = np.random.default_rng(0), list[bytes]()
    for _ in range(DRAWN):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
        contents.append(stream.getvalue())
    for place in range(number):
        beside = folder / f"{place // 1000:04}"
        beside.mkdir(parents=True, exist_ok=True)
        (beside / f"{place:08}.jpg").write_bytes(contents[place % DRAWN] + b"%d" % place)
        (beside / f"{place:08}.txt").write_text(f"picture number {place}\n")


def measure(kind: str, source: str, arguments: argparse.Namespace) -> None:
    """Print the cells of a source's row."""
    begun = time.monotonic()
    data = TextImageDataModule(**{kind: source}, batch_size=BATCH, num_workers=arguments.workers, image_size=224)
    data.setup()
    scanned = time.monotonic()
    batches = iter(data.train_dataloader())
    next(batches)
    first = time.monotonic()
    for _ in range(arguments.batches):
        next(batches)
    speed = arguments.batches * BATCH / (time.monotonic() - first)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    del batches  # which ends the loader processes
    time.sleep(1)
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{scanned - begun:.1f} s | {first - scanned:.1f} s | {speed:,.0f} | {own:,.0f} MiB | {theirs:,.0f} MiB")


if __name__ == "__main__":
    main()
