"""What a run's ``config.yaml`` keeps of its optimizer, for another run by that file."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.commands.options import OptimizerOptions, resolve_optimizer


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"optimizer": "adamw"}, None),
        ({"optimizer": "adamw", "momentum": 0.8}, 0.8),
        ({"optimizer": "sgd"}, 0.9),
        ({"optimizer": "muon"}, 0.95),
    ],
)
def test_the_momentum_that_is_kept(given: dict[str, Any], kept: float | None) -> None:
    """Of AdamW, which has none, the one that was given: by its file Muon has its own, and the run itself goes on."""
    module = CLIPWrapper("tiny", TINY, **given)
    resolved = resolve_optimizer(OptimizerOptions(**given), module.hparams)
    assert (resolved.optimizer, resolved.momentum) == (given["optimizer"], kept)
    assert resolved.learning_rate == TINY["optimizer"]["lr"]
    again = CLIPWrapper("tiny", TINY, **(given | {"momentum": resolved.momentum}))
    again.require_same_model(module.hparams)
    if kept is None:
        by_that_file = CLIPWrapper("tiny", TINY, optimizer="muon", momentum=resolved.momentum)
        assert by_that_file.hparams["momentum"] == 0.95
