"""One model in every format: its size, how long it takes to tell what it is and to load it, and what it scores.

    python benchmarks/formats.py CHECKPOINT data_dir --output formats

Writes the checkpoint to each format, reads it back, and scores the held-out pairs by ``train-clip evaluate``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from commands import command, evaluate, recalls

KINDS = {"open_clip": "open_clip", "huggingface": "huggingface", "safetensors": "model.safetensors"}
HELD_OUT = 0.1


def main() -> None:
    """Print a row a format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    files = {"checkpoint": options.checkpoint}
    for kind, name in KINDS.items():
        files[kind] = options.output / name
        command("convert", options.checkpoint, files[kind], "--to", kind)
    print("| format | MiB | inspect, s | load, s | R@1 i→t | R@10 i→t | R@1 t→i | R@10 t→i |")
    print("|---" * 8 + "|")
    for kind, file in files.items():
        split = ("--folder", options.folder, "--split", "held_out", "--val_share", HELD_OUT)
        found = recalls(evaluate(file, *split, scores=options.output / f"{kind}.json"))
        figures = " | ".join(f"{100 * found[place]:.1f}%" for place in (0, 2, 3, 5))
        print(f"| {kind} | {_mib(file):.1f} | {_inspecting(file):.2f} | {_loading(file):.2f} | {figures} |", flush=True)


def _mib(file: Path) -> float:
    parts = [file] if file.is_file() else list(file.iterdir())
    return sum(part.stat().st_size for part in parts) / 2**20


def _inspecting(file: Path) -> float:
    """Seconds of the whole command."""
    started = time.perf_counter()
    command("inspect", file)
    return time.perf_counter() - started


def _loading(file: Path) -> float:
    """Seconds of ``load`` in this process, libraries loaded before."""
    import train_clip

    train_clip.load(file)
    started = time.perf_counter()
    train_clip.load(file)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
