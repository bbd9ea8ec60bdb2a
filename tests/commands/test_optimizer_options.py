"""What a run's ``config.yaml`` keeps of its optimizer, for another run by that file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from train_clip import CLIPWrapper, TextImageDataModule
from train_clip.commands.run import Job, settled
from train_clip.options import RunOptions, TrainingOptions


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
def test_the_momentum_that_is_kept(given: dict[str, Any], kept: float | None, tmp_path: Path) -> None:
    """The one that was given, or none: by its file Muon and SGD have their own, and the run itself goes on."""
    module = CLIPWrapper("tiny", TINY, **given)
    asked = TrainingOptions.pick(given).flat()
    config = settled(Job("train", module, TextImageDataModule(tmp_path), asked, epochs=1), RunOptions(), tmp_path)
    assert (config["optimizer"], config["momentum"]) == (given["optimizer"], kept)
    assert config["learning_rate"] == TINY["optimizer"]["lr"]
    again = CLIPWrapper("tiny", TINY, **(given | {"momentum": config["momentum"]}))
    again.require_same_model(module.hparams)
    if kept is None:
        for optimizer, own in (("muon", 0.95), ("sgd", 0.9)):
            by_that_file = CLIPWrapper("tiny", TINY, optimizer=optimizer, momentum=config["momentum"])
            assert by_that_file.hparams["momentum"] == own
