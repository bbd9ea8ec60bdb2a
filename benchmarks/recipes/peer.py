"""open_clip's side of ``compare.py``: its own training program on the same pairs, judged by the same command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rows import BATCH, DATA

HERE = Path(__file__).parent
MODEL = DATA["emoji"].model
BACKGROUND = (255, 255, 255)  # train-clip's; open_clip leaves what lies beneath transparent pixels


@dataclass(frozen=True)
class Peer:
    """Where open_clip is, and how it trains.

    Args:
        python: of an environment that has open_clip_torch, timm and pandas.
        table: its pairs, a row a caption.
        model: its configuration file.
        precision: ``amp_bf16`` or ``fp32``.
    """

    python: Path
    table: Path
    model: Path
    precision: str

    def train(self, run: Path, samples: int, warmup: float, seed: int, words: str) -> tuple[Path, float]:
        """Train from scratch.

        Args:
            run: where to.
            samples: pairs to be seen, to the next whole epoch.
            warmup: its share of the steps; 0 for open_clip's default.
            seed: of weights and order.
            words: further options.

        Returns:
            The last checkpoint, and the processor time in seconds.
        """
        with self.table.open(encoding="utf-8") as file:
            an_epoch = (sum(1 for _ in csv.reader(file)) - 1) // BATCH
        epochs = -(-samples // (an_epoch * BATCH))
        checkpoint, ended = run / "checkpoints" / f"epoch_{epochs}.pt", run / "seconds.json"
        if not ended.exists():
            call = [str(self.python), str(HERE / "their_training.py"), str(self.model), "--model", self.model.stem]
            call += ["--train-data", str(self.table), "--dataset-type", "csv", "--csv-separator", ","]
            call += ["--csv-img-key", "image", "--csv-caption-key", "caption", "--device", "cpu", "--workers", "0"]
            call += ["--precision", self.precision, "--batch-size", str(BATCH), "--epochs", str(epochs)]
            call += [
                "--save-frequency",
                str(epochs),
                "--logs",
                str(run.parent),
                "--name",
                run.name,
                "--seed",
                str(seed),
            ]
            call += ["--warmup", str(int(warmup * epochs * an_epoch))] if warmup else []
            run.parent.mkdir(parents=True, exist_ok=True)
            with run.with_suffix(".txt").open("w") as said:
                process = subprocess.Popen([*call, *words.split()], stdout=said, stderr=subprocess.STDOUT)
                _, status, used = os.wait4(process.pid, 0)
            if status or not checkpoint.exists():
                sys.exit(f"{' '.join(call)}\n{run.with_suffix('.txt').read_text()[-3000:]}")
            ended.write_text(json.dumps(used.ru_utime + used.ru_stime))
        return checkpoint, float(json.loads(ended.read_text()))


def peer_of(python: Path, folder: Path, output: Path, precision: str) -> Peer:
    """Write what open_clip trains on: pictures on white, their table, and the model's configuration."""
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    table = output / "train.csv"
    with (folder / "train.csv").open(encoding="utf-8", newline="") as source, table.open("w", newline="") as target:
        rows = csv.writer(target)
        rows.writerow(("image", "caption"))
        for row in csv.DictReader(source):
            picture = pictures / f"{Path(row['image']).stem}.png"
            if not picture.exists():
                on_white(folder / row["image"]).save(picture)
            rows.writerow((picture.resolve(), row["caption"]))
    model = output / f"{MODEL.stem}.json"
    model.write_text(json.dumps(configuration(), indent=2))
    return Peer(python, table.resolve(), model.resolve(), precision)


def on_white(file: Path) -> Image.Image:
    """A picture without transparency."""
    layer = Image.open(file).convert("RGBA")
    canvas = Image.new("RGB", layer.size, BACKGROUND)
    canvas.paste(layer, mask=layer)
    return canvas


def configuration() -> dict[str, object]:
    """The model as open_clip's configuration files have it."""
    from train_clip.models.config import ViTConfig, read_config

    config = read_config(str(MODEL))
    assert isinstance(config.image, ViTConfig)
    image, text = config.image, config.text
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": image.size,
            "layers": image.layers,
            "width": image.width,
            "patch_size": image.patch,
            "head_width": image.width // image.heads,
        },
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": text.vocab,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    }
