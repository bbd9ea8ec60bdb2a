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


def rates(optimizer: str, *values: str) -> Rows:
    """A row a learning rate."""
    return {f"{optimizer} {value}": f"--optimizer {optimizer} --learning_rate {value}" for value in values}


PAPER = "--optimizer adamw --learning_rate 1e-3"
MUON = "--optimizer muon --learning_rate 4e-3"


def on_top(base: str, **further: str) -> dict[str, str | Theirs]:
    """A base, then a row for each addition to it."""
    return {"muon": base} | {f"muon, {name.replace('_', ' ')}": f"{base} {words}" for name, words in further.items()}


EXPERIMENTS: dict[str, Rows] = {
    # Rates, of the first seed.
    "adamw": rates("adamw", "1e-3", "5e-4", "2e-3", "4e-3"),
    "muon": rates("muon", "4e-3", "1e-3", "2e-3", "8e-3", "16e-3"),
    "open_clip": {
        "open_clip, AdamW 1e-3": Theirs("--lr 1e-3"),
        "open_clip, timm's Muon 4e-3": Theirs("--opt timm/muon --lr 4e-3"),
        "open_clip, timm's Muon 2e-3": Theirs("--opt timm/muon --lr 2e-3"),
        "open_clip, timm's NAdaMuon 2e-3": Theirs("--opt timm/nadamuon --lr 2e-3"),
    },
    # Whether what Muon leaves to AdamW wants Muon's rate too.
    "rates-apart": {
        "muon": MUON,
        "muon 4e-3, rest 1e-3": "--optimizer muon --learning_rate 1e-3 --muon_learning_rate 4e-3",
        "muon 8e-3, rest 1e-3": "--optimizer muon --learning_rate 1e-3 --muon_learning_rate 8e-3",
    },
    # What Muon brings, and what each further thing does on top of it.
    "optimizers": {"paper": PAPER, "muon": MUON},
    # Few passes over the pairs, as over a few million (CIFAR).
    "few-passes": {"paper": PAPER}
    | on_top(
        MUON,
        jitter="--color_jitter 0.5",
        flips="--horizontal_flip 0.5",
        crops_from_0_4="--resize_ratio 0.4",
        batches_of_128="--batch_size 128",
        half_the_patches="--mask_ratio 0.5 --unmasked_share 0.1",
        sigmoid="--loss sigmoid",
    ),
    "on-top": on_top(
        MUON,
        jitter="--color_jitter 0.5",
        grey="--grayscale 0.2",
        flips="--horizontal_flip 0.5",
        crops_from_0_4="--resize_ratio 0.4",
        batches_of_128="--batch_size 128",
        batches_of_64="--batch_size 64",
        decay_0_5="--weight_decay 0.5",
        stochastic_depth="--stochastic_depth 0.2",
        half_the_patches="--mask_ratio 0.5 --unmasked_share 0.1",
        sigmoid="--loss sigmoid",
    ),
}
