"""Training crops of photographs: images a second of one core, beside the peer's on the same bytes; the loader's rest.

    python benchmarks/decoding.py data_dir [--peer /path/to/env/bin/python] [--image_size 224] [--rounds 7]

Each way is a process of its own with one thread, and they take turns, one round at a time; rates are of the process's
own time, which others do not change, the median of the rounds, files in the page cache. Ours begins at the path and
ends in bytes; the peer's is open_clip's training transform on what Pillow opens of bytes that are in memory, and ends
in normalised float32. The loader's workers are watched in mid-epoch: one is busy that runs, or waits for a core that
another process has (its main thread by /proc/PID/schedstat, so Linux only).
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("paper's crop", "resize_ratio 0.75", "Pillow's full decode", "the peer's transform")
WARM, WATCHED, BATCH = 4, 24, 64  # batches


def main() -> None:
    """Take turns, then watch the loader."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", help="a Python that has open_clip")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    ways = WAYS if options.peer else WAYS[:-1]
    processes = {way: start(way, options) for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds + 1):
        for way, process in processes.items():
            rates[way].append(ask(process))
    for process in processes.values():
        process.communicate()
    medians = {way: statistics.median(found[1:]) for way, found in rates.items()}
    peer = medians.get(WAYS[-1])
    print("| one core | images/s | of the peer's |\n|---|---|---|")
    for way, rate in medians.items():
        print(f"| {way} | {rate:.0f} | {f'{rate / peer:.2f}' if peer else ''} |")
    busy, used, rate = watch(options)
    print(f"\nloader, {options.workers} workers: {rate:.0f} images/s, busy {busy:.1%} of the time, running {used:.1%}")


def start(way: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that does one way once for every line that it is given."""
    python = options.peer if way == WAYS[-1] else sys.executable
    command = [python, __file__, "--way", way, str(options.folder), str(options.image_size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str]) -> float:
    """Images a second of one round."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def serve(way: str, folder: Path, size: int) -> None:
    """In the process of one way: a round for each line, and its rate."""
    do = peers(folder, size) if way == WAYS[-1] else pillows(folder) if way == WAYS[2] else ours(way, folder, size)
    for epoch, _ in enumerate(sys.stdin):
        began = time.process_time()
        number = do(epoch)
        print(number / (time.process_time() - began), flush=True)


def ours(way: str, folder: Path, size: int) -> Callable[[int], int]:
    """Every pair once, from its path to bytes, with its caption line."""
    from train_clip.data.folder import scan_folder
    from train_clip.data.samples import TrainingPairs

    pairs = list(scan_folder(folder).require_pairs().pairs)
    data = TrainingPairs(pairs, size, None if way == WAYS[0] else 0.75)
    return lambda epoch: len([data[epoch, index] for index in range(len(data))])


def pillows(folder: Path) -> Callable[[int], int]:
    """Every picture decoded by Pillow, and nothing else."""
    from PIL import Image

    content = contents(folder)
    return lambda _: len([Image.open(io.BytesIO(each)).load() for each in content])


def peers(folder: Path, size: int) -> Callable[[int], int]:
    """Every picture by open_clip's training transform with its default augmentation."""
    import open_clip
    from PIL import Image

    transform = open_clip.image_transform(size, is_train=True)
    content = contents(folder)
    return lambda _: len([transform(Image.open(io.BytesIO(each))) for each in content])


def contents(folder: Path) -> list[bytes]:
    """The bytes of the photographs."""
    return [path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]


def watch(options: argparse.Namespace) -> tuple[float, float, float]:
    """Shares of the time that workers are busy and run, and images a second, in the middle of a long epoch."""
    import multiprocessing

    from train_clip.training.data_module import TextImageDataModule

    data = TextImageDataModule(options.folder, BATCH, options.workers, options.image_size)
    data.setup()
    pairs: Any = list(data.training_pairs)
    data.training_pairs = pairs * (1 + (WARM + WATCHED + 8) * BATCH // len(pairs))
    batches = iter(data.train_dataloader())
    for _ in range(WARM):
        next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    began, before = time.perf_counter(), [scheduled(pid) for pid in workers]
    for _ in range(WATCHED):
        next(batches)
    seconds, after = time.perf_counter() - began, [scheduled(pid) for pid in workers]
    ran = sum(last[0] - first[0] for first, last in zip(before, after, strict=True)) / seconds / len(workers)
    waited = sum(last[1] - first[1] for first, last in zip(before, after, strict=True)) / seconds / len(workers)
    return ran + waited, ran, WATCHED * BATCH / seconds


def scheduled(pid: int | None) -> tuple[float, float]:
    """Seconds that a process ran, and that it waited for a core."""
    ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    return ran / 1e9, waited / 1e9


if __name__ == "__main__":
    if sys.argv[1] == "--way":
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
