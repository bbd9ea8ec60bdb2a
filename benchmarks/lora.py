"""Memory and checkpoints of LoRA beside full fine-tuning: ViT-B/32 with random weights, the whole command.

python benchmarks/lora.py photos_dir [--batch_size 2] [--steps 4]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_clip.checkpoints.own import write_safetensors
from train_clip.models.clip import CLIP
from train_clip.models.config import read_config

WAYS = ("", "--lora 8", "--lora 64")
MIB = 2**20


def main() -> None:
    """Print a row a way."""
    parser = argparse.ArgumentParser(description="What LoRA saves.")
    parser.add_argument("photos", type=Path, help="a folder of images and captions")
    parser.add_argument("--batch_size", default="2")
    parser.add_argument("--steps", default="4")
    arguments = parser.parse_args()
    print("| | trained parameters | peak memory | checkpoint | time |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        config, backbone = read_config("ViT-B/32"), Path(name, "backbone.safetensors")
        write_safetensors(config, CLIP(config).state_dict(), backbone)
        for place, way in enumerate(WAYS):
            output = Path(name, str(place))
            command = [sys.executable, "-m", "train_clip", "train", "--pretrained", backbone, *way.split()]
            command += ["--folder", arguments.photos, "--batch_size", arguments.batch_size, "--num_workers", "0"]
            command += ["--max_steps", arguments.steps, "--val_share", "0", "--output", output]
            begun = time.monotonic()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                assert process.stdout
                printed = process.stdout.read()
                _, status, used = os.wait4(process.pid, 0)
            assert status == 0, printed
            trained = printed.partition("parameters (")[2].partition(" ")[0]
            size = (output / "checkpoints" / "last.ckpt").stat().st_size
            took = time.monotonic() - begun
            shown = f"`train --pretrained … {way}".strip() + "`"
            peak = f"{used.ru_maxrss * 1024 / MIB:,.0f} MiB"
            print(f"| {shown} | {trained} | {peak} | {size / MIB:,.1f} MiB | {took:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
