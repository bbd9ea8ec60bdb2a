"""Pictures of classes that a model with random weights tells apart, but not all of them; and such a model."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.models.config import config_from_dict

COLOURS = {"dark red": (150, 90, 90), "green": (90, 150, 90), "blue": (90, 90, 150)}
NUMBER = 20  # of each class


def save_model(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a tiny CLIP with random weights."""
    torch.manual_seed(seed)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=0, **quiet)
    trainer.strategy.connect(CLIPWrapper("tiny", config_from_dict(TINY)))
    trainer.save_checkpoint(path)
    return path


def draw_classes(folder: Path, number: int = NUMBER, captions: bool = False) -> Path:
    """Draw pictures in folders named after their class: its color, under much noise."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name.replace(" ", "_")).mkdir(parents=True)
        for place in range(number):
            noise = rng.normal(0, 120, (16, 16, 3)) + rng.normal(0, 25, 3) + colour
            path = folder / name.replace(" ", "_") / f"{name[0]}{place:02}.png"
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
            if captions:
                path.with_suffix(".txt").write_text(f"{name} number {place}\n")
    return folder
