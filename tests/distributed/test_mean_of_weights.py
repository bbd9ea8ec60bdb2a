"""The running mean of the weights on two processes: the same bits on both, and one process's mean and figures.

B  pairs of the global batch
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.checkpoints.own import read_checkpoint
from train_clip.gather import world
from train_clip.training.checkpoints import Checkpoints, Interval

B, BATCHES = 8, 5
END = 29
SMALL = TINY | {"text": TINY["text"] | {"vocab": END + 1, "context": 10}}


def pairs(number: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 16, 16, dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, END, (number, 10), generator=generator)
    tokens[:, -1] = END
    return list(zip(images, tokens, strict=True))


def train(folder: Path) -> dict[str, Any]:
    """Five batches in three steps, in float64, on as many processes as there are; then a validation."""
    rank, processes = world()
    torch.manual_seed(0)
    # Beside its epsilon AdamW does not divide out a gradient's size.
    module = CLIPWrapper("small", SMALL, 3, learning_rate=0.02, eps=0.5, warmup_steps=0, ema=0.35)
    share = B // processes
    own = [pair for place, pair in enumerate(pairs(B * BATCHES, 0)) if place % B // share == rank]
    trainer = bare_trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        precision="64-true",
        use_distributed_sampler=False,
        callbacks=[Checkpoints(folder / str(processes), Interval(steps=1))],
        enable_checkpointing=True,
    )
    held_out = pairs(12, 1)[rank::processes]
    trainer.fit(module, DataLoader(own, batch_size=share), DataLoader(held_out, batch_size=share))
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    return {"mean": module.ema.state_dict(), "figures": figures, "model": module.model.state_dict()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("mean")
    (folder / "runs").mkdir()
    return train(folder / "runs"), run(partial(train, folder / "runs"), folder), folder / "runs"


def test_both_have_the_same_bits_and_one_processs_mean(results):
    """Tensors and the count of updates: equal on both; against one process 1e-10."""
    alone, (first, second), _ = results
    assert first["mean"].keys() == alone["mean"].keys()
    assert first["mean"].pop("_extra_state") == second["mean"].pop("_extra_state") == {"num_updates": 3}
    for name, value in first["mean"].items():
        assert torch.equal(value, second["mean"][name]), name
        torch.testing.assert_close(value, alone["mean"][name], rtol=0, atol=1e-10, msg=name)
    moved = first["model"]["visual.proj"] - first["mean"]["model.visual.proj"]
    assert moved.abs().max() > 1e-4


def test_the_figures_are_one_processs(results):
    """Of the weights and of the mean, which has others; on both processes."""
    alone, both, _ = results
    expected = alone["figures"]
    names = {name.removeprefix("val/") for name in expected if name.startswith("val/")}
    assert {name.removeprefix("val_ema/") for name in expected if name.startswith("val_ema/")} == names
    assert expected["val_ema/loss"] != pytest.approx(expected["val/loss"], abs=1e-6)
    for found in both:
        assert found["figures"] == pytest.approx(expected, abs=1e-6)


def test_the_file_is_written_once_and_whole(results):
    """Of two processes too: both names, of the mean."""
    _, (first, _), folder = results
    assert {file.name for file in (folder / "2" / "ema").iterdir()} == {"best.ckpt", "last.ckpt"}
    state = read_checkpoint(folder / "2" / "ema" / "last.ckpt")["state_dict"]
    assert all(torch.equal(value, first["mean"][name]) for name, value in state.items())
