"""What the data costs before and while a model trains: scan, first batch, `data check`, and images a second.

    python benchmarks/data.py [--pairs 100000] [--photographs data_dir]

The pairs are generated: JPEGs of 32×32 pixels and a caption each, a thousand to a folder. Each figure is of a process
of its own, with its largest resident size; loader processes are measured apart. Two processes run at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MIB = 2**10  # ru_maxrss counts KiB
BATCH = 256
LOADED = 40  # batches of 64 whose rate is taken


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--photographs", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pairs"
        started = time.perf_counter()
        generate(folder, options.pairs)
        print(f"{options.pairs:,} pairs generated in {time.perf_counter() - started:.0f} s\n")
        print(f"{'what':44} {'seconds':>8} {'MiB':>7}")
        show("libraries alone", run("nothing", folder))
        show("scan", run("scan", folder))
        show("scan, split, order and first batch of 256", run("start", folder, "0", "1"))
        show("the same on each of two processes", *run_two("start", folder))
        os.environ["XDG_CACHE_HOME"] = scratch
        show("data check", run("check", folder))
        show("data check, nothing changed", run("check", folder))
        print(f"\n{'images/s of the loader':44} {'0':>8} {'1':>8} {'2 workers':>10}")
        for name, source, size in (
            ("generated, 32 pixels", folder, 32),
            ("photographs, 224", options.photographs, 224),
        ):
            if source is not None:
                rates = [run("load", source, str(size), str(workers))[0] for workers in (0, 1, 2)]
                print(f"{name:44} {rates[0]:8,.0f} {rates[1]:8,.0f} {rates[2]:10,.0f}", flush=True)


def show(what: str, *measured: tuple[float, float]) -> None:
    """Print the slowest and the largest of the processes."""
    seconds, mib = (max(values) for values in zip(*measured, strict=True))
    print(f"{what:44} {seconds:8.2f} {mib:7.0f}", flush=True)


def run(*words: object) -> tuple[float, float]:
    """Measure in a process of its own: seconds (or a rate), MiB."""
    return _figures(_start(*words))


def run_two(what: str, folder: Path) -> list[tuple[float, float]]:
    """Measure two processes of one run, at the same time."""
    return [_figures(process) for process in [_start(what, folder, rank, "2") for rank in ("0", "1")]]


def _start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True)


def _figures(process: subprocess.Popen[str]) -> tuple[float, float]:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args} ended with {process.returncode}")
    seconds, mib = map(float, output.split()[-2:])
    return seconds, mib


def generate(folder: Path, pairs: int) -> None:
    """Write noise, as JPEG, and captions that differ."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(pairs):
        place = folder / f"{index // 1000:04}"
        if index % 1000 == 0:
            place.mkdir(parents=True)
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "JPEG")
        (place / f"{index:07}.jpg").write_bytes(stream.getvalue())
        (place / f"{index:07}.txt").write_text(f"picture number {index} of noise\n")


def measured(what: str, folder: Path, *rest: str) -> float:
    """Do one thing in this process; how long it took, or how many images came a second."""
    import train_clip.training.data_module  # noqa: F401, its time is not the data's
    from train_clip.data.folder import scan_folder

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    started = time.perf_counter()
    if what == "scan":
        assert scan_folder(folder).require_pairs().pairs
    elif what == "start":
        data = module(folder, 32, 0, int(rest[0]), int(rest[1]))
        data.setup()
        assert len(next(iter(data.train_dataloader())).images) == BATCH // int(rest[1])
    elif what == "check":
        from train_clip import cli

        with contextlib.redirect_stdout(sys.stderr):
            cli.main(["data", "check", str(folder)])
    elif what == "load":
        data = module(folder, int(rest[0]), int(rest[1]), 0, 1, batch_size=64)
        data.setup()
        return rate(data.train_dataloader())
    return time.perf_counter() - started


def module(folder: Path, size: int, workers: int, rank: int, processes: int, batch_size: int = BATCH) -> Any:
    """The data module as one of several processes has it."""
    from train_clip.training.data_module import TextImageDataModule

    data = TextImageDataModule(folder, batch_size, workers, size, val_share=0.05)
    strategy = SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=processes, strategy=strategy, lightning_module=None
    )
    return data


def rate(loader: Any) -> float:
    """Images a second, after the first batch, over as many epochs as it takes."""
    images, batches, started = 0, 0, 0.0
    while batches <= LOADED:
        for batch in loader:
            if not batches:
                started = time.perf_counter()
            else:
                images += len(batch.images)
            batches += 1
            if batches > LOADED:
                break
    return images / (time.perf_counter() - started)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        figure = measured(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
        print(figure, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB)
    else:
        main()
