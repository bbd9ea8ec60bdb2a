"""A run that goes on with another number of processes: the same pairs, captions and crops in the same order.

All runs of two processes happen in one pair of them: starting processes is what takes time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from two_processes import bare_trainer, run

from tests.conftest import TINY, write_pairs
from train_clip import CLIPWrapper
from train_clip.gather import gather_objects
from train_clip.training.checkpoints import AtomicCheckpointIO, Checkpoints, Interval
from train_clip.training.data_module import TextImageDataModule

PAIRS, BATCH, EPOCHS = 18, 4, 2  # 4 batches an epoch, 2 pairs left over
INSIDE, EDGE = 3, 4  # steps that are resumed from

Sample = tuple[float, int]


class Seen(L.Callback):
    """Digests of pixels and caption of each sample of this process, batch by batch; losses of the global batch."""

    def __init__(self) -> None:
        self.batches: list[list[Sample]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        images, tokens = arguments[2].images.double().flatten(1), arguments[2].texts
        weights = torch.arange(images.shape[1], dtype=torch.float64)
        digests = zip(
            (images @ weights).tolist(), (tokens * torch.arange(tokens.shape[1])).sum(dim=1).tolist(), strict=True
        )
        self.batches.append(list(digests))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def fit(
    folder: Path,
    name: str,
    resume: Path | None = None,
    accumulate: int = 1,
    workers: int = 0,
    shards: str | None = None,
) -> dict[str, Any]:
    """Train on as many processes as there are; global batches in the order of the ranks, losses, final weights."""
    torch.manual_seed(0)
    seen = Seen()
    trainer = bare_trainer(
        callbacks=[seen, Checkpoints(folder / name, Interval(steps=1), keep=99)],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )
    module = CLIPWrapper("tiny", TINY, minibatch_size=3, learning_rate=1e-2, warmup_steps=2)
    source = {"shards": shards} if shards else {"folder": folder / "data"}
    how = {"image_size": 16, "context_length": 16, "val_share": 0.0}
    data = TextImageDataModule(**source, batch_size=BATCH, num_workers=workers, **how)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    everyones = gather_objects(seen.batches)
    batches = [[sample for part in parts for sample in part] for parts in zip(*everyones, strict=True)]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return {"batches": batches, "losses": seen.losses, "weights": weights}


def everything_on_two(folder: Path) -> dict[str, Any]:
    """An uninterrupted run, and resumed ones from its own states and from one process's."""
    results = {"whole": fit(folder, "two")}
    for step in (INSIDE, EDGE):
        for source in ("one", "two"):
            results[f"{source} {step}"] = fit(folder, f"{source}-{step}", folder / source / f"step-{step:08}.ckpt")
    results["accumulated"] = fit(folder, "accumulated-two", folder / "accumulated" / "step-00000002.ckpt", 3)
    results["workers"] = fit(folder, "workers", folder / "two" / f"step-{INSIDE:08}.ckpt", workers=1)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    write_pairs(folder / "data", PAIRS)
    results = {"one": fit(folder, "one"), "accumulated": fit(folder, "accumulated", accumulate=3)}
    first, second = run(partial(everything_on_two, folder), folder)
    results |= {f"two {name}": result for name, result in first.items()}
    results["second"] = second
    for step in (INSIDE, EDGE):
        results[f"one from two {step}"] = fit(folder, f"back-{step}", folder / "two" / f"step-{step:08}.ckpt")
    return results


def test_two_processes_see_what_one_does(runs):
    """Uninterrupted: the same samples in the same places of each batch, the same losses (float32's rounding)."""
    assert len(runs["one"]["batches"]) == 8
    assert len({sample for batch in runs["one"]["batches"] for sample in batch}) > 24
    assert runs["two whole"]["batches"] == runs["one"]["batches"]
    assert runs["two whole"]["losses"] == pytest.approx(runs["one"]["losses"], rel=1e-4)


@pytest.mark.parametrize("step", [INSIDE, EDGE], ids=["inside", "edge"])
@pytest.mark.parametrize("how", ["two two", "two one", "one from two"], ids=["2→2", "1→2", "2→1"])
def test_a_run_goes_on_where_it_was(runs, how, step):
    """Inside an epoch and on its edge: the rest of the samples, and of the losses to float32's rounding."""
    result = runs[f"{how} {step}"]
    assert result["batches"] == runs["one"]["batches"][step:]
    assert result["losses"] == pytest.approx(runs["one"]["losses"][step:], rel=1e-4)


def test_two_processes_end_in_the_same_bits(runs):
    """2→2 against the uninterrupted run of two, and both processes against each other: bit for bit."""
    for step in (INSIDE, EDGE):
        for name, tensor in runs["two whole"]["weights"].items():
            assert torch.equal(runs[f"two two {step}"]["weights"][name], tensor), name
            assert torch.equal(runs["second"][f"two {step}"]["weights"][name], tensor), name


def test_accumulation_goes_on_with_other_processes(runs):
    """3 of 4 batches a step, then the fourth: saved after 2 steps, on the edge, by one process and resumed by two."""
    assert runs["two accumulated"]["batches"] == runs["accumulated"]["batches"][4:]


def test_another_number_of_workers_changes_nothing(runs):
    """Resumed by two processes with a loader process each, saved without: the same weights, bit for bit."""
    assert runs["two workers"]["batches"] == runs["one"]["batches"][INSIDE:]
    for name, tensor in runs["two whole"]["weights"].items():
        assert torch.equal(runs["two workers"]["weights"][name], tensor), name
