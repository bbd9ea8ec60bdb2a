"""Evaluations on two gloo processes: each example is embedded once and counted once, as on one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY, write_pairs
from train_clip import CLIPWrapper
from train_clip.errors import UserError
from train_clip.evaluation import collect
from train_clip.gather import world
from train_clip.scores.while_training import Evaluations, find
from train_clip.training.checkpoints import Checkpoints

OPTIONS = "folder: {0}/{1}\nclasses: {0}/classes.txt\nbatch_size: 2\n"


def train(folder: Path) -> dict[str, Any]:
    """Two epochs in float64, an evaluation after each step, on as many processes as there are."""
    rank, processes = world()
    torch.manual_seed(0)
    module = CLIPWrapper("tiny", TINY, learning_rate=0.02, eps=0.5, warmup_steps=0, ema=0.5)
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 16, 16, generator=generator).double(), f"picture {place}") for place in range(16)]
    own = [pair for place, pair in enumerate(pairs) if place % 8 // (8 // processes) == rank]
    saving = Checkpoints(folder / str(processes), best_by="more/top1")
    sources = {name: str(folder / f"{name}.yaml") for name in ("more", "one")}
    evaluations = Evaluations(sources, "1 step", "more/top1")
    trainer = bare_trainer(
        max_epochs=2,
        precision="64-true",
        use_distributed_sampler=False,
        callbacks=[evaluations, saving],
        enable_checkpointing=True,
    )
    collected, numbers = [], {"embed_images": 0, "embed_texts": 0}
    with pytest.MonkeyPatch.context() as patch:

        def noting(original: Any, *given: Any) -> Any:
            collected.append(original(*given))
            return collected[-1]

        def counting(original: Any, name: str, model: Any, some: Any, how: Any) -> torch.Tensor:
            numbers[name] += len(some)
            return original(model, some, how)

        patch.setattr(collect, "collect", partial(noting, collect.collect))
        patch.setattr(collect, "embed", SimpleNamespace(**vars(collect.embed)))
        for name in numbers:
            patch.setattr(collect.embed, name, partial(counting, getattr(collect.embed, name), name))
        trainer.fit(module, DataLoader(own, batch_size=8 // processes))
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:3] in ("mor", "one")}
    parts = [(one.images, one.texts, one.caption_ids, one.labels, one.owners, len(one.paths)) for one in collected]
    return {"figures": figures, "collected": parts, "best": saving.best, "numbers": numbers}


def test_two_processes_score_as_one(tmp_path):
    """Nine images of which two cannot be read, in batches of two, and a single one: embeddings 1e-6, all else equal.

    Of the model and of the EMA of its weights, after each of four steps. Each image and caption is embedded by one
    process, and the two classes by both.
    """
    data = write_pairs(tmp_path / "data" / "cat", 9)
    (data.parent / "dog").mkdir()
    for place in (2, 5):
        (data / f"{place:03}.png").rename(data.parent / "dog" / f"{place:03}.png")
        (data / f"{place:03}.txt").rename(data.parent / "dog" / f"{place:03}.txt")
    (data / "000.png").write_bytes(b"no image")
    (data / "007.png").write_bytes(b"no image")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "more.yaml").write_text(OPTIONS.format(tmp_path, "data"))
    write_pairs(tmp_path / "single" / "cat", 1)
    (tmp_path / "one.yaml").write_text(OPTIONS.format(tmp_path, "single"))
    (tmp_path / "rendezvous").mkdir()
    alone, both = train(tmp_path), run(partial(train, tmp_path), tmp_path / "rendezvous")
    assert len(alone["collected"]) == 16
    assert alone["numbers"]["embed_images"] == 8 * (7 + 1)
    assert {"more/top1", "more/R@1_image_to_text", "more_ema/R@5_text_to_image", "one/top1"} <= alone["figures"].keys()
    for found in both:
        assert found["figures"] == alone["figures"]
        assert found["best"] == alone["best"]
        for mine, its in zip(alone["collected"], found["collected"], strict=True):
            assert its[-1] == mine[-1] and (its[-1], len(its[1])) in ((7, 14), (1, 2))
            for one, other in zip(mine[:2], its[:2], strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
            assert torch.equal(mine[2], its[2]) and mine[3:5] == its[3:5]
    of_both = {name: sum(found["numbers"][name] for found in both) for name in alone["numbers"]}
    assert of_both["embed_images"] == alone["numbers"]["embed_images"]
    assert of_both["embed_texts"] == alone["numbers"]["embed_texts"] + 16 * 2


def find_two(folder: Path) -> list[str]:
    """What each of two sources is, where this process's second one is another than the other process's."""
    found = []
    for names in (("pairs", "gone"), ("pairs", "fewer"), ("pairs", "pairs")):
        try:
            found.append(f"{len(find(collect.ScoreOptions(folder=folder / names[world()[0]])))} images")
        except UserError as error:
            found.append(str(error))
    return found


def test_a_source_that_one_process_does_not_find_is_an_error_on_each(tmp_path):
    """One that skipped it alone would be waited for."""
    write_pairs(tmp_path / "pairs", 3)
    write_pairs(tmp_path / "fewer", 2)
    (tmp_path / "rendezvous").mkdir()
    first, second = run(partial(find_two, tmp_path), tmp_path / "rendezvous")
    expected = ("there is no such folder", "the processes found (3, 2) images", "3 images")
    for mine, its, words in zip(first, second, expected, strict=True):
        assert words in mine
        assert words in its
