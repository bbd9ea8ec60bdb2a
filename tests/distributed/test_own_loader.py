"""A loader of the user's own on two processes, under a bare Trainer: split by Lightning, refused where uneven."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.errors import UserError
from train_clip.gather import world

PAIRS = 10
PIXELS = torch.randint(0, 256, (PAIRS, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = [f"picture {index}" for index in range(PAIRS)]


class Seen(L.Callback):
    """The captions of each batch of this process, and the global batch's loss."""

    def __init__(self) -> None:
        self.captions: list[list[str]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.captions.append(list(arguments[2][1]))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def fit(loader: Any, **how: Any) -> dict[str, Any]:
    """One epoch of a bare Trainer on as many processes as there are."""
    torch.manual_seed(0)
    seen = Seen()
    trainer = bare_trainer(callbacks=[seen], max_epochs=1, **how)
    error = ""
    try:
        trainer.fit(CLIPWrapper("tiny", TINY), loader)
    except UserError as caught:
        error = str(caught)
    return {"captions": seen.captions, "losses": seen.losses, "error": error}


def loader(pairs: int, batch_size: int, **how: Any) -> DataLoader[Any]:
    return DataLoader(list(zip(PIXELS[:pairs], CAPTIONS[:pairs], strict=True)), batch_size=batch_size, **how)


def everything() -> dict[str, Any]:
    rank = world()[0]
    return {
        "split": fit(loader(PAIRS, 2)),
        "shares": fit(loader(*((8, 4), (6, 3))[rank]), use_distributed_sampler=False),
        "epochs": fit(loader(*((10, 2), (8, 2))[rank]), use_distributed_sampler=False),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(everything, tmp_path_factory.mktemp("own"))


def test_lightning_splits_a_plain_loader(results):
    """Ten pairs in batches of 2 a process: 2, 2 and 1 on each, no pair on both, and 4, 4 and 2 of all in a batch.

    The losses are those of one process that reads the batches of both together, and no batch is lost.
    """
    first, second = (result["split"]["captions"] for result in results)
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [2, 2, 1]
    assert sorted(chain.from_iterable(first + second)) == CAPTIONS
    together = [[*a, *b] for a, b in zip(first, second, strict=True)]
    batches = [(PIXELS[[CAPTIONS.index(c) for c in batch]], batch) for batch in together]
    alone = fit(DataLoader(batches, batch_size=None))
    assert alone["captions"] == together
    assert results[0]["split"]["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_uneven_shares_of_a_batch_stop_all_processes(results):
    """4 pairs on one and 3 on the other: the same message on both, before the towers run, and nobody hangs."""
    for result in results:
        error = result["shares"]["error"]
        assert error.startswith("The processes have from 3 to 4 pairs in one batch; expected equally many.")
        assert "drop_last=True" in error
        assert result["shares"]["losses"] == []


def test_epochs_of_unequal_length_stop_all_processes(results):
    """5 batches on one and 4 on the other: said at the start, where one would wait for ever at the end."""
    for result in results:
        assert result["epochs"]["error"].startswith("The processes have from 4 to 5 batches in one epoch;")
        assert result["epochs"]["captions"] == []
