"""NaN on one of two processes: both stop at that step, with the weights that they had before it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.errors import UserError
from train_clip.gather import world

B, BATCHES = 3, 4


class Weights(L.Callback):
    """Copies of the weights before each batch; on the second process the third batch's image is poisoned."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.before.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        if self.how == "image" and index == 2 and world()[0] == 1:
            batch[0][1, 0, 2, 2] = torch.nan

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if self.how == "gradient" and trainer.global_step == 2 and world()[0] == 1:
            module.model.visual.proj.grad[0, 0] = torch.inf


def poisoned(how: str) -> dict[str, Any]:
    """What the run ends with on this process."""
    torch.manual_seed(0)
    images = torch.randn(2 * B * BATCHES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = [(image, f"picture {index}") for index, image in enumerate(images)]
    watch = Weights(how)
    trainer = bare_trainer(callbacks=[watch], max_epochs=1)
    module = CLIPWrapper("tiny", TINY, warmup_steps=0)
    try:
        trainer.fit(module, DataLoader(pairs, batch_size=B))
        error = "none"
    except UserError as caught:
        error = str(caught)
    after = module.state_dict()
    unchanged = [all(torch.equal(after[name], tensor) for name, tensor in one.items()) for one in watch.before]
    return {"error": error, "unchanged": unchanged}


def both() -> dict[str, Any]:
    return {how: poisoned(how) for how in ("image", "gradient")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(both, tmp_path_factory.mktemp("nan"))


@pytest.mark.parametrize("how", ["image", "gradient"])
def test_both_stop_at_the_same_step(results, how):
    """A NaN in one image, or in one process's gradient after it was averaged: batch 3 is named on both, nothing hangs.

    Two steps changed the weights, the third did not.
    """
    for result in results:
        assert result[how]["error"].startswith("Batch 3: the loss is ")
        assert result[how]["unchanged"] == [False, False, True]
