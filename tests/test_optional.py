"""Libraries that only some commands need: each that is missing is one line that says what needs it, before the work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from train_clip import optional as module
from train_clip.encoders.sources import load_image_encoder
from train_clip.errors import UserError
from train_clip.probes import calibrate, classify, heads, rows
from train_clip.probes.features import Encoded
from train_clip.search import embed, index, page, vectors

NUMBERS = Encoded(torch.zeros(2, 3), torch.zeros(2, 3))
TASK = heads.Task(NUMBERS, torch.tensor([0, 1]), torch.eye(3)[:2], 1.0)


class Many(list[str]):
    path = Path("x.npy")


# What is missing, as Python imports it and as pip installs it; what needs it, and what does.
NEEDED = {
    "pyarrow.parquet": ("pyarrow", "Parquet", lambda: vectors.open_vectors("x.parquet")),
    "pyarrow": ("pyarrow", "Parquet", lambda: rows.rows_to(Path("x.parquet"), {"a": str}).__enter__()),
    "usearch.index": ("usearch", "x.npy: an index of 3 embeddings", lambda: index.Index(Many("abc"), list)),
    "uvicorn": ("uvicorn", "--page", lambda: page.serve(lambda: pytest.fail("loaded"), 0)),
    "starlette": ("starlette", "--page", lambda: page.serve(lambda: pytest.fail("loaded"), 0)),
    "sklearn": ("scikit-learn", "A linear probe", lambda: heads.fit_linear(TASK, {"lambda": 1.0})),
    "sklearn.linear_model": ("scikit-learn", "--calibrate", lambda: calibrate.platt(np.ones((2, calibrate.BINS)))),
    "timm": ("timm", "This encoder or model", lambda: load_image_encoder("timm:resnet18")),
    "torchvision.models": ("torchvision", "This encoder or model", lambda: load_image_encoder("torchvision:net")),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_library_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, what, call = NEEDED[name]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert said.startswith(f"{what} needs {package}, which is not available (")
    assert f"Install it: pip install {package}" in said and "\n" not in said


@pytest.mark.parametrize("command", [embed.embed, classify.classify])
def test_it_is_said_before_anything_is_read(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is looked for: there is none."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    options: Any = SimpleNamespace(output=Path("x.parquet"), head=None, classes=Path("c"), calibration=None)
    with pytest.raises(UserError, match=r"pip install pyarrow, or use another format\.$"):
        command("nowhere.ckpt", options)


def test_a_library_that_is_there() -> None:
    assert module.optional("json", "A test") is sys.modules["json"]
