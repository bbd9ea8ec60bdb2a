"""Options of augmentation on the command line of both verbs that take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY, write_pairs
from train_clip import cli
from train_clip.checkpoints.own import read_checkpoint

OPTIONS = {"color_jitter": 0.5, "grayscale": 0.2, "horizontal_flip": 0.4, "vertical_flip": 0.3}
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def test_train_and_finetune_keep_them_and_go_on_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From scratch, then of that model, resumed without naming them: checkpoint and ``config.yaml`` have them."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "data", 8)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    short = "--folder data --batch_size 4 --val_share 0 --enable_progress_bar false --accelerator cpu".split()
    cli.main(["train", "--model_name", "tiny.yaml", *short, *WORDS, "--max_steps", "1", "--output", "run"])
    start = ["--pretrained", "run/checkpoints/last.ckpt"]
    cli.main(["finetune", *start, *short, *WORDS, "--max_steps", "1", "--output", "tuned"])
    cli.main(["finetune", "--resume", "tuned", "--max_steps", "2"])
    for run, steps in (("run", 1), ("tuned", 2)):
        state = read_checkpoint(Path(run, "checkpoints", "last.ckpt"))
        assert state["global_step"] == steps
        for kept in (state["hyper_parameters"], yaml.safe_load(Path(run, "config.yaml").read_text())):
            assert {name: kept[name] for name in OPTIONS} == OPTIONS
