"""What every test shares: no CUDA test without CUDA, and small things to test on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

# Tensors here are tiny: threads only wait for one another. Set before torch is imported, and for the commands that
# tests start as processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tests import forked
from train_clip.models.config import ModelConfig
from train_clip.models.config import config_from_dict


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """None beside this one for a test or a file, which take less than a start, and for those that share one GPU.

    Else one more than there are cores: tests wait for processes and clocks much of their time.
    """
    folders = any(Path(words).is_dir() for words in config.args)
    return 1 + (os.cpu_count() or 1) if folders and "gpu" not in config.getoption("markexpr") else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none, and what takes minutes unless it was asked for."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """A run's curves take longer to draw than its few steps to train: empty files instead, but for ``drawn``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **how: Path(file).touch())
        yield


@pytest.fixture(scope="session", autouse=True)
def variables() -> None:
    """What starts as a process has the variables that the tests have, not those of the test that was the first."""
    forked.of_tests.update(os.environ)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What Lightning leaves in the environment where it trains on several processes ends with the test."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn in this test."""
    monkeypatch.setattr(Figure, "savefig", DRAW)


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A ViT CLIP that trains in milliseconds: 16 pixels, two blocks a tower."""
    return config_from_dict(TINY)


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Twelve pairs of noise and numbered captions, two lines each."""
    return write_pairs(tmp_path / "pairs", 12)


DRAW = Figure.savefig
TINY = {
    "name": "tiny",
    "embed_dim": 16,
    "image": {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2},
    "text": {"context": 16, "vocab": 49408, "layers": 2, "width": 16, "heads": 2},
    "optimizer": {
        "lr": 1e-3,
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "warmup_steps": 10,
        "epochs": 2,
    },
}


def said(stop: pytest.ExceptionInfo[SystemExit]) -> str:
    """What a command that was stopped said: its message, or the error that it became exit code 2 for."""
    return str(stop.value.__context__ if isinstance(stop.value.code, int) else stop.value.code)


def write_pairs(folder: Path, number: int, size: int = 20) -> Path:
    """Write ``number`` pairs of random pictures and captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        pixels = rng.integers(0, 256, (size, size + index % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(f"picture {index}\nthe one numbered {index}\n")
    return folder
