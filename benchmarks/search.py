"""What `train-clip embed` and `search` take for photographs and for generated embeddings, and what an index finds.

    python benchmarks/search.py photos_dir [--number 1000000] [--indexed 200000] [--output .npy .parquet .npz]

Each command is a process of its own: wall clock, processor time and peak memory, the start of Python and the model's
loading included.
The model is ViT-B/32 with random weights, on which time and memory do not depend. Generated embeddings are of unit
norm, around a thousand centers; queries for the index are drawn like them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train_clip import load
from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.own import write_safetensors
from train_clip.estimates import size
from train_clip.models.clip import CLIP
from train_clip.models.config import read_config
from train_clip.search.index import RECALL_AT, Index
from train_clip.search.nearest import nearest
from train_clip.search.vectors import open_vectors, writer

MODEL, DIM, CENTERS, BLOCK, QUERIES = "ViT-B/32", 512, 1000, 10_000, 100
NOISE = 1.0  # length of what is added to a center of length 1


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="What search takes.")
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--number", type=int, default=1_000_000)
    parser.add_argument("--indexed", type=int, default=200_000)
    parser.add_argument("--output", nargs="+", default=[".npy", ".parquet", ".npz"], help="formats to write and search")
    parser.add_argument("--index", type=Path, help="only build the index of a file of embeddings")
    parser.add_argument("--model", type=Path, help="only write a model")
    parser.add_argument("--write", nargs=2, type=Path, metavar=("FILE", "MODEL"), help="only write --number embeddings")
    arguments = parser.parse_args()
    if arguments.index:
        Index(open_vectors(arguments.index), lambda: queries(QUERIES))
        return
    if arguments.model:
        write_safetensors(config := read_config(MODEL), CLIP(config).state_dict(), arguments.model)
        return
    if arguments.write:
        generate(*arguments.write, arguments.number)
        return
    print("| | time | processor | peak memory |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, own = folder / "model.safetensors", [sys.executable, __file__]
        # In processes of their own, as all else: a command's peak counts from what its parent takes.
        subprocess.run([*own, "--model", str(model)], check=True)
        command = [sys.executable, "-m", "train_clip.cli"]
        words = ["--folder", str(arguments.photos), "--output", str(folder / "photos.parquet"), "--device", "cpu"]
        row("`embed` the photographs", [*command, "embed", str(model), *words])
        search = [*command, "search", "--device", "cpu"]
        row("`search` among them", [*search, str(folder / "photos.parquet"), "a photo of a dog"])
        for ending in arguments.output:
            file, number = folder / f"x{ending}", arguments.number
            write = [*own, "--number", str(number), "--write", str(file), str(model)]
            row(f"generating and writing {number:,} embeddings, `{ending}`", write)
            what = f"`search` among them, `{ending}`, {size(file.stat().st_size)}"
            row(f"{what}, 1 query", [*search, str(file), "a photo of a dog", "--exact"])
            many = [*map(str, range(QUERIES)), "--json", str(folder / "x.json"), "--exact"]
            row(f"the same, {QUERIES} queries", [*search, str(file), *many])
            file.unlink()
        file = folder / "index.npy"
        write = [*own, "--number", str(arguments.indexed), "--write", str(file), str(model)]
        subprocess.run(write, check=True)
        text = row(f"building an index of {arguments.indexed:,}", [*own, "--index", str(file)])
        print(*compare(file), *[line for line in text.splitlines() if "finds" in line], sep="\n")


def row(what: str, command: list[str]) -> str:
    """Run a command, print its line of the table, and return what it printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        _, code, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if code:
        sys.exit(text)
    processor = used.ru_utime + used.ru_stime
    print(f"| {what} | {seconds:.1f} s | {processor:.1f} s | {size(used.ru_maxrss * 1024)} |", flush=True)
    return text


def compare(file: Path) -> Iterator[str]:
    """How long a query takes by the index and one by one, in milliseconds of processor time, and the index's size."""
    opened, some = open_vectors(file), queries(QUERIES)
    index = Index(opened, lambda: some)
    matrix = np.load(file, mmap_mode="r")
    blocks = [matrix[at : at + BLOCK] for at in range(0, len(matrix), BLOCK)]
    for what, find in (("by the index", index), ("one by one", lambda one, k: nearest(blocks, one, k))):
        start = time.process_time()
        for one in some:
            find(one[None], RECALL_AT)
        yield f"A query among {len(opened):,} {what}: {(time.process_time() - start) * 1000 / len(some):.1f} ms"
    taken = Path(f"{file}.usearch").stat().st_size
    yield f"The index: {size(taken)}, {taken / len(opened):.0f} bytes a row, of which {2 * DIM} are numbers."


def generate(file: Path, model: Path, number: int) -> None:
    """Write embeddings that say that the model made them."""
    about = {"version": 1, "model": MODEL, "fingerprint": fingerprint(load(model).model), "checkpoint": str(model)}
    about |= {"dim": DIM, "dtype": "float32", "normalized": True, "kind": "image", "root": str(file.parent)}
    with writer(file, about | {"number": number}) as append:
        for start in range(0, number, BLOCK):
            names = [f"{place}.jpg" for place in range(start, min(start + BLOCK, number))]
            append(drawn(len(names), start + 1), names, names, [""] * len(names))


def drawn(number: int, seed: int) -> np.ndarray:
    """Rows around centers, of unit norm."""
    centers = unit(np.random.default_rng(0).standard_normal((CENTERS, DIM), np.float32))
    rng = np.random.default_rng(seed)
    noise = unit(rng.standard_normal((number, DIM), np.float32))
    return unit(centers[rng.integers(CENTERS, size=number)] + NOISE * noise)


def queries(number: int) -> np.ndarray:
    """Others drawn like them."""
    return drawn(number, 2**31)


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
