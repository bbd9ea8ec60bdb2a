"""What is tried: experiments, each a list of rows, each row words for ``train-clip train``.

A row is judged against the first of its experiment. ``paper`` stands for the model's own numbers, which are the paper's
but for the rate: 1e-3, the best of 5e-4 to 4e-3 (experiment ``adamw``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
BATCH = 256


class Data(NamedTuple):
    """A data set, and how a small model is trained on it while choosing.

    Args:
        model: its configuration.
        words: for every row.
        classes: whether captions are classes, and what is judged is zero-shot accuracy, not retrieval.
    """

    model: Path
    words: tuple[str, ...]
    classes: bool


SHARED = f"--batch_size {BATCH} --resize_ratio 0.75"
DATA = {
    "emoji": Data(HERE / "tiny-16-64px.yaml", (*SHARED.split(), "--epochs", "40"), False),
    "cifar": Data(HERE / "tiny-8-32px.yaml", (*SHARED.split(), "--epochs", "4"), True),
}


class Theirs(NamedTuple):
    """A row of open_clip's own program.

    Args:
        words: its options, beside model, data and batch size.
        warmup: its share of the steps; 0 for open_clip's own 10,000 steps.
        samples: captions to be seen, each with its image, to the next whole epoch.
    """

    words: str
    warmup: float = 0.1
    samples: int = 51_200  # 40 epochs of 5 batches of 256, as ours


Rows = Mapping[str, str | Theirs]


def rates(optimizer: str, *values: str) -> Rows:
    """A row a learning rate."""
    return {f"{optimizer} {value}": f"--optimizer {optimizer} --learning_rate {value}" for value in values}


EXPERIMENTS: dict[str, Rows] = {
    "adamw": rates("adamw", "1e-3", "5e-4", "2e-3", "4e-3"),
    "muon": rates("muon", "4e-3", "1e-3", "2e-3", "8e-3"),
    "cifar-muon": rates("muon", "4e-3", "1e-3", "2e-3", "8e-3", "16e-3"),
}
