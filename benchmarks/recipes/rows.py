"""What is tried: experiments, each a list of rows, each row words for ``train-clip train``.

A row is judged against the first of its experiment. ``paper`` stands for the model's own numbers, which are the paper's
but for the rate: 1e-3, the best of 5e-4 to 4e-3 (experiment ``adamw``).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).with_name("tiny-16-64px.yaml")


class Data(NamedTuple):
    """A data set and how long is trained on it while choosing.

    Args:
        words: for every row.
        classes: whether captions are classes, and what is judged is zero-shot accuracy, not retrieval.
    """

    words: tuple[str, ...]
    classes: bool


DATA = {
    "emoji": Data((*"--batch_size 256 --epochs 40 --resize_ratio 0.75".split(),), False),
    "cifar": Data((*"--batch_size 256 --epochs 4 --image_size 32 --resize_ratio 0.75".split(),), True),
}

Rows = dict[str, str]
MUON = "--optimizer muon --learning_rate 1e-3"

EXPERIMENTS: dict[str, Rows] = {
    "adamw": {f"adamw {rate}": f"--learning_rate {rate}" for rate in ("1e-3", "5e-4", "2e-3", "4e-3")},
    "muon": {f"muon {rate}": f"--optimizer muon --learning_rate {rate}" for rate in ("1e-3", "5e-4", "2e-3", "4e-3")},
}
