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
    samples: int = 25_600  # 20 epochs of 5 batches of 256, as ours


Rows = Mapping[str, str | Theirs]


PAPER = "--optimizer adamw --learning_rate 1e-3"
MUON = "--optimizer muon --learning_rate 1e-3"
SMALL = "--config small --learning_rate 1e-3"
ONE_RATE = "--optimizer muon --learning_rate {0} --muon_learning_rate {0}"
ADAMW_OF_PEER = "--lr {0}"
MUON_OF_PEER = "--opt timm/{0} --lr {1} --eps 1e-7"  # without an eps it fails
THEIR_MUON = Theirs(MUON_OF_PEER.format("muon", "4e-3"))


def alone(name: str, words: str, values: str) -> dict[str, str | Theirs]:
    """A row for each value of one option."""
    return {f"{name} {value}": words.format(value) for value in values.split()}


ADDITIONS = {
    "jitter": "--color_jitter 0.5",
    "flips": "--horizontal_flip 0.5",
    "crops from 0.4": "--resize_ratio 0.4",
    "the paper's crop": "--resize_ratio null",
    "batches of 128": "--batch_size 128",
    "batches of 512": "--batch_size 512",
    "decay 0.5": "--weight_decay 0.5",
    "stochastic depth": "--stochastic_depth 0.2",
    "half the patches": "--mask_ratio 0.5 --unmasked_share 0.1",
    "sigmoid": "--loss sigmoid",
    "ema": "--ema 0.99",
}


EXPERIMENTS: dict[str, Rows] = {
    # AdamW's rate. The paper's is for batches 128 times as large.
    "adamw": alone("adamw", "--optimizer adamw --learning_rate {0}", "1e-3 5e-4 2e-3 4e-3"),
    # Muon's rate, where it is everything's.
    "one-rate": alone("one rate", ONE_RATE, "4e-3 1e-3 2e-3 8e-3 16e-3"),
    # Muon's rate, where what is left to AdamW keeps AdamW's own. By itself it is 8 times that.
    "rates": {
        "paper": PAPER,
        "one rate 4e-3": ONE_RATE.format("4e-3"),
        "muon, 4 times": f"{MUON} --muon_learning_rate 4e-3",
        "muon": MUON,
        "muon, 16 times": f"{MUON} --muon_learning_rate 16e-3",
    },
    # What each further thing does on top of Muon.
    "on-top": {"muon": MUON} | {f"muon, {what}": f"{MUON} {words}" for what, words in ADDITIONS.items()},
    # What the recipes change. This and the next were tried with a wider model too: ``-- --model_name mini-8-64px``.
    "muon": {"paper": PAPER, "muon": MUON, "paper, its own crop": f"{PAPER} --resize_ratio null"},
    # What colour jitter does with either.
    "jitter": {
        "paper": PAPER,
        "paper, jitter": f"{PAPER} {ADDITIONS['jitter']}",
        "muon": MUON,
        "muon, jitter": f"{MUON} {ADDITIONS['jitter']}",
    },
    # open_clip's rates, of the first seed.
    "open_clip": {
        "open_clip, AdamW": Theirs(ADAMW_OF_PEER.format("1e-3")),
        "open_clip, AdamW 2e-3": Theirs(ADAMW_OF_PEER.format("2e-3")),
        "open_clip, timm's Muon": THEIR_MUON,
        "open_clip, timm's Muon 2e-3": Theirs(MUON_OF_PEER.format("muon", "2e-3")),
        "open_clip, timm's Muon 8e-3": Theirs(MUON_OF_PEER.format("muon", "8e-3")),
        "open_clip, timm's NAdaMuon 2e-3": Theirs(MUON_OF_PEER.format("nadamuon", "2e-3")),
    },
    # Half as many epochs as above: all see as many pairs; then the recipe in about twice the time.
    "compare": {
        "paper, 20 epochs": f"{PAPER} --epochs 20",
        "small, 20 epochs": f"{SMALL} --epochs 20",
        "open_clip, its defaults": Theirs("", 0.0),
        "open_clip, AdamW": Theirs(ADAMW_OF_PEER.format("1e-3")),
        "open_clip, timm's Muon": THEIR_MUON,
        "small, 45 epochs": f"{SMALL} --epochs 45",
    },
    # Both Muons by themselves, for more seeds.
    "muons": {"small, 20 epochs": f"{SMALL} --epochs 20", "open_clip, timm's Muon": THEIR_MUON},
    # The recipe's own 40 epochs, which the row "muon" is, and as many pairs for open_clip.
    "compare-40": {
        "paper": PAPER,
        "muon": MUON,
        "open_clip, timm's Muon, 40 epochs": THEIR_MUON._replace(samples=51_200),
    },
}
