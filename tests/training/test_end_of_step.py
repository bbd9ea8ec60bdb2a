"""What happens at the end of a step, in its order: as a sequence of calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import TINY
from tests.training.tiny_encoders import bare_trainer
from train_clip import CLIPWrapper
from train_clip.training.checkpoints import AtomicCheckpointIO, Checkpoints, Interval
from train_clip.training.ema import WeightsEMA
from train_clip.training.end_of_step import EndOfStep, FiniteSteps

ORDER = ["update", "clamp", "EMA", "position", "flag"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_order_at_the_end_of_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulate: int) -> None:
    """Update → clamp → EMA → position → flag → save, in each step; while a gradient is pending only the position."""
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader([(image, f"picture {place}") for place, image in enumerate(images)], batch_size=4)
    module, trail = CLIPWrapper("tiny", TINY, warmup_steps=0, ema=0.9), []

    def watch(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any, **further: Any) -> Any:
            trail.append(what)
            return function(*arguments, **further)

        monkeypatch.setattr(owner, name, watched)

    watch(module.model, "clamp_temperature", "clamp")
    watch(WeightsEMA, "follow", "EMA")
    watch(EndOfStep, "on_train_batch_end", "position")
    watch(FiniteSteps, "read", "flag")
    watch(AtomicCheckpointIO, "save_checkpoint", "save")
    updates = L.Callback()
    updates.on_train_start = lambda trainer, _: trainer.optimizers[0].register_step_post_hook(  # type: ignore[method-assign]
        lambda *_: trail.append("update")
    )
    trainer = bare_trainer(
        callbacks=[updates, Checkpoints(tmp_path, Interval(steps=1))], plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True, accumulate_grad_batches=accumulate, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader)
    # The flag is read before the update too, and before each of a save's files: the EMA's and the state's.
    step = ["flag", *ORDER, "save", "flag", "save"]
    expected = [*step] * 5 if accumulate == 1 else ["position", *step, "position", *step, *step]
    assert [what for place, what in enumerate(trail) if trail[max(0, place - 1) : place] != [what]] == expected


def test_a_module_that_is_fitted_again_begins_anew() -> None:
    """Three batches, then two of another Trainer: its position and its length are those of the second run alone."""
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs, module = [(image, f"picture {place}") for place, image in enumerate(images)], CLIPWrapper("tiny", TINY)
    for number in (3, 2):
        bare_trainer().fit(module, DataLoader(pairs[: 4 * number], batch_size=4))
        assert module.consumed_batches == module._end_of_step.num_steps == number
