"""Evaluations on two gloo processes: each example is embedded once and counted once, as on one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY, write_pairs
from train_clip import CLIPWrapper
from train_clip.commands import evaluate
from train_clip.gather import world
from train_clip.scores.while_training import Evaluations
from train_clip.training.checkpoints import Checkpoints

OPTIONS = "folder: {0}/data\nclasses: {0}/classes.txt\nbatch_size: 2\n"
SEEN = list[int]()


def train(folder: Path) -> dict[str, Any]:
    """Two epochs in float64, an evaluation after each step, on as many processes as there are."""
    rank, processes = world()
    torch.manual_seed(0)
    module = CLIPWrapper("tiny", TINY, learning_rate=0.02, eps=0.5, warmup_steps=0, ema=0.5)
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 16, 16, generator=generator).double(), f"picture {place}") for place in range(16)]
    own = [pair for place, pair in enumerate(pairs) if place % 8 // (8 // processes) == rank]
    saving = Checkpoints(folder / str(processes), best_by="more/top1")
    evaluations = Evaluations({"more": str(folder / "more.yaml")}, "1 step", "more/top1")
    trainer = bare_trainer(
        max_epochs=2,
        precision="64-true",
        use_distributed_sampler=False,
        callbacks=[evaluations, saving],
        enable_checkpointing=True,
    )
    collected = []
    collect = evaluate.collect

    def noting(model: Any, options: Any, progress: Any) -> Any:
        collected.append(collect(model, options, progress))
        return collected[-1]

    evaluate.collect = noting
    try:
        trainer.fit(module, DataLoader(own, batch_size=8 // processes))
    finally:
        evaluate.collect = collect
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("more")}
    parts = [(one.images, one.texts, one.caption_ids, one.labels, one.owners, len(one.paths)) for one in collected]
    return {"figures": figures, "collected": parts, "best": saving.best}


def test_two_processes_score_as_one(tmp_path):
    """Nine images of which two cannot be read, in batches of two: embeddings 1e-6, all else and the figures equal.

    Of the model and of the EMA of its weights, after each of four steps.
    """
    data = write_pairs(tmp_path / "data" / "cat", 9)
    (data.parent / "dog").mkdir()
    for place in (2, 5):
        (data / f"{place:03}.png").rename(data.parent / "dog" / f"{place:03}.png")
        (data / f"{place:03}.txt").rename(data.parent / "dog" / f"{place:03}.txt")
    (data / "000.png").write_bytes(b"no image")
    (data / "007.png").write_bytes(b"no image")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "more.yaml").write_text(OPTIONS.format(tmp_path))
    (tmp_path / "rendezvous").mkdir()
    alone, both = train(tmp_path), run(partial(train, tmp_path), tmp_path / "rendezvous")
    assert len(alone["collected"]) == 8
    assert {"more/top1", "more/R@1_image_to_text", "more_ema/R@5_text_to_image"} <= alone["figures"].keys()
    for found in both:
        assert found["figures"] == alone["figures"]
        assert found["best"] == alone["best"]
        for mine, its in zip(alone["collected"], found["collected"], strict=True):
            assert its[-1] == mine[-1] == 7 and len(its[1]) == 14
            for one, other in zip(mine[:2], its[:2], strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
            assert torch.equal(mine[2], its[2]) and mine[3:5] == its[3:5]
