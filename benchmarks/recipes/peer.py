"""open_clip's rows: its own training program on the same pairs, from scratch, judged by the same command as ours."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from once import run_once
from PIL import Image
from rows import BATCH

from train_clip.checkpoints.open_clip import write_config
from train_clip.models.config import read_config

HERE = Path(__file__).parent
BACKGROUND = (255, 255, 255)  # train-clip's; open_clip leaves what lies beneath transparent pixels


@dataclass(frozen=True)
class Peer:
    """Where open_clip is, and how it trains.

    Args:
        python: of an environment that has open_clip_torch, timm and pandas.
        table: its pairs, a row a caption.
        model: its configuration file.
    """

    python: Path
    table: Path
    model: Path

    @staticmethod
    def of(python: Path, folder: Path, output: Path, model: Path) -> Peer:
        """Write what open_clip trains on: pictures on white, their table, and the model's configuration.

        Args:
            python: of its environment.
            folder: with train.csv.
            output: where to write.
            model: our configuration of the model.
        """
        (output / "pictures").mkdir(parents=True, exist_ok=True)
        with (folder / "train.csv").open(encoding="utf-8", newline="") as source:
            pairs = [(row["image"], row["caption"]) for row in csv.DictReader(source)]
        table, theirs = output / "train.csv", output / f"ViT-{model.stem}.json"  # it chooses by the name
        with table.open("w", encoding="utf-8", newline="") as target:
            rows = csv.writer(target)
            rows.writerow(("image", "caption"))
            for image, caption in pairs:
                picture = output / "pictures" / f"{Path(image).stem}.png"
                if not picture.exists():
                    on_white(folder / image).save(picture)
                rows.writerow((picture.resolve(), caption))
        theirs.write_text(json.dumps(write_config(read_config(str(model)))["model_cfg"], indent=2))
        return Peer(python, table.resolve(), theirs.resolve())

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
        call = [str(self.python), str(HERE / "their_training.py"), str(self.model), "--model", self.model.stem]
        call += ["--train-data", str(self.table), "--dataset-type", "csv", "--csv-separator", ","]
        call += ["--csv-img-key", "image", "--csv-caption-key", "caption", "--device", "cpu", "--workers", "0"]
        call += ["--precision", "amp_bf16", "--batch-size", str(BATCH), "--epochs", str(epochs)]
        call += ["--save-frequency", str(epochs), "--logs", str(run.parent), "--name", run.name, "--seed", str(seed)]
        call += ["--warmup", str(int(warmup * epochs * an_epoch))] if warmup else []
        seconds = run_once(run, [*call, *words.split()])
        return run / "checkpoints" / f"epoch_{epochs}.pt", seconds


def on_white(file: Path) -> Image.Image:
    """A picture without transparency."""
    layer = Image.open(file).convert("RGBA")
    canvas = Image.new("RGB", layer.size, BACKGROUND)
    canvas.paste(layer, mask=layer)
    return canvas
