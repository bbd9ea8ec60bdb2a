"""A tiny model, pictures of plain colors, and files of embeddings that say whatever a test wants them to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.conftest import TINY
from train_clip import load
from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.own import write_safetensors
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.search.vectors import writer


def save_model(file: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = config_from_dict(TINY)
    write_safetensors(config, CLIP(config).state_dict(), file)
    return file


def save_pictures(folder: Path, number: int) -> list[str]:
    """Pictures of one color each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{row:03}.png" for row in range(number)]
    for name in names:
        Image.new("RGB", (40, 30), tuple(rng.integers(0, 256, 3).tolist())).save(folder / name)
    return names


def save_embeddings(
    file: Path, model: Path, rows: np.ndarray, paths: Sequence[str], captions: Sequence[str], root: Path, **about: Any
) -> Path:
    """Write a file of embeddings by hand, as if the model had made them."""
    told = {
        "version": 1,
        "model": "tiny",
        "fingerprint": fingerprint(load(model).model),
        "checkpoint": str(model),
        "weights": {},
        "dim": rows.shape[1],
        "dtype": "float32",
        "normalized": True,
        "kind": "image",
        "source": str(root),
        "root": str(root),
        "number": len(rows),
        "device": "cpu",
        "content": "by hand",
    }
    with writer(file, told | about) as append:
        append(rows, [f"key {path}" for path in paths], paths, captions)
    return file


def save_calibration(file: Path, model: Path, threshold: float, kind: str = "captions") -> Path:
    """Write what a model's similarities mean: a precision of 90% from the threshold on, even odds at a half of it."""
    values = {"threshold": threshold, "precision": 0.9, "slope": 8.0, "intercept": -4 * threshold}
    told = {"version": 1, "kind": kind, "fingerprint": fingerprint(load(model).model), "calibration": values}
    file.write_text(json.dumps(told))
    return file


def unit_rows(number: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((number, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
