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
        ({"optimizer": "sgd"}, None),
        ({"optimizer": "muon"}, None),
        ({"optimizer": "muon", "momentum": 0.9}, 0.9),
    ],
)
def test_the_momentum_that_is_kept(given: dict[str, Any], kept: float | None) -> None:
    """The one that was given, or none: by its file Muon and SGD have their own, and the run itself goes on."""
    module = CLIPWrapper("tiny", TINY, **given)
    resolved = resolve_optimizer(OptimizerOptions(**given), module.hparams)
    assert (resolved.optimizer, resolved.momentum) == (given["optimizer"], kept)
    assert resolved.learning_rate == TINY["optimizer"]["lr"]
    again = CLIPWrapper("tiny", TINY, **(given | {"momentum": resolved.momentum}))
    again.require_same_model(module.hparams)
    if kept is None:
        for optimizer, own in (("muon", 0.95), ("sgd", 0.9)):
            by_that_file = CLIPWrapper("tiny", TINY, optimizer=optimizer, momentum=resolved.momentum)
            assert by_that_file.hparams["momentum"] == own
