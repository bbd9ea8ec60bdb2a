"""Options of Lightning's Trainer: every strategy works or is refused in a line, as is all that Lightning refuses."""

from __future__ import annotations

import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import strategies

from tests import forked
from tests.commands.test_train import arguments, model_file, run_train
from tests.conftest import said
from train_clip import cli

__all__ = ["model_file"]

MULTIPLE = ["ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"]
WORKS = [*MULTIPLE, "single_device", "DDPStrategy", "SingleDeviceStrategy"]
OTHERS = [name for name in (*strategies.StrategyRegistry, *strategies.__all__) if name not in WORKS]


def parsed(*words: str) -> Any:
    return cli.parse("train", ["--folder", "data_dir", *words])[1].arguments["trainer"]


def run(folder: Path, model: Path, output: Path, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return forked.run(["-m", "train_clip.cli", *arguments(folder, model, output, "--max_steps", "1", *words)], **how)


def refusal(*words: Any) -> str:
    """What a command that is refused says: a line."""
    with pytest.raises(SystemExit) as stop:
        run_train(*words)
    # Where training has begun, further lines say what is saved.
    message, *notes = said(stop).split("\n")
    assert message[-1] == "." and all(note.startswith(("Saved after batch", "To resume: ")) for note in notes)
    return message


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("strategy", "ModelParallelStrategy", "lightning.pytorch.strategies.ModelParallelStrategy"),
        ("strategy", "lightning.pytorch.strategies.DDPStrategy", "lightning.pytorch.strategies.DDPStrategy"),
        ("strategy", "lightning.pytorch.strategies.ddp.DDPStrategy", "lightning.pytorch.strategies.ddp.DDPStrategy"),
        ("accelerator", "CPUAccelerator", "lightning.pytorch.accelerators.CPUAccelerator"),
    ],
)
def test_a_class_arrives_as_it_is_written(option, value, name):
    """By its name and by its path, old and short; a registered name stays one."""
    assert parsed(f"--{option}", value)[option]["class_path"] == name
    assert parsed("--strategy", "ddp", "--accelerator", "cpu")["strategy"] == "ddp"


def test_arguments_of_a_strategy(pair_folder, model_file, tmp_path):
    """DDP with an argument of its own and a time limit: it trains, its ``config.yaml`` is plain, and it is resumed."""
    words = "--strategy DDPStrategy --strategy.find_unused_parameters true --strategy.timeout 0:10:00".split()
    assert parsed(*words)["strategy"]["init_args"]["timeout"] == str(timedelta(minutes=10))
    ended = run(pair_folder, model_file, tmp_path / "run", *words)
    assert ended.returncode == 0, ended.stderr
    given = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["strategy"]
    assert given["init_args"]["timeout"] == "0:10:00"
    assert given["init_args"]["find_unused_parameters"] is True
    resume = ["-m", "train_clip.cli", "train", "--resume", str(tmp_path / "run"), "--max_steps", "2"]
    ended = forked.run(resume)
    assert ended.returncode == 0, ended.stderr
    assert "Done after 2 steps" in ended.stdout


@pytest.mark.parametrize("name", MULTIPLE)
def test_ddp_by_its_names(pair_folder, model_file, tmp_path, name):
    ended = run(pair_folder, model_file, tmp_path / "run", "--devices", "2", "--strategy", name, processes=2)
    assert ended.returncode == 0, ended.stderr


def test_sharded_weights_are_saved_in_one_file(pair_folder, model_file, tmp_path):
    """As asked for; by default they would be folders, which are refused."""
    words = ["--strategy", "ModelParallelStrategy"]
    assert "Add --strategy.save_distributed_checkpoint false" in refusal(
        pair_folder, model_file, tmp_path / "run", *words
    )
    words += ["--strategy.save_distributed_checkpoint", "false"]
    ended = run(pair_folder, model_file, tmp_path / "run", *words)
    assert ended.returncode == 0, ended.stderr
    assert "model.logit_scale" in torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_strategies_are_refused_in_a_line(pair_folder, model_file, tmp_path, name):
    """All that are registered, and all classes, on a machine without a GPU; no folder is left behind."""
    assert refusal(pair_folder, model_file, tmp_path / "run", "--strategy", name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--val_check_interval 100 --val_share 0.3", "`val_check_interval` (100) must be less than or equal to"),
        ("--callbacks EarlyStopping --callbacks.monitor nothing", "Early stopping conditioned on metric `nothing`"),
        (
            "--callbacks EarlyStopping --callbacks.monitor x --callbacks.mode y",
            "these options: `mode` can be min, max, got y",
        ),
        ("--limit_train_batches 0.01", "its length is 0 steps"),
        ("--profiler nothing", "profiler"),
        ("--accumulate_grad_batches 0", "--accumulate_grad_batches 0: expected 1 or above"),
        ("--devices 0", "devices"),
        ("--strategy ddpp", "invalid strategy name"),
    ],
)
def test_what_lightning_refuses_is_told_in_a_line(pair_folder, model_file, tmp_path, words, message):
    """When the Trainer is made, when it trains, and when it validates."""
    assert message in refusal(pair_folder, model_file, tmp_path / "run", *words.split())


A_TASK = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "devices", "message"),
    [
        ({}, 1, r"--ntasks=4.*by srun, .*unset SLURM_NTASKS"),
        (A_TASK, 1, r"SLURM_NTASKS is 4, and each task would train alone\. Start one task for each device by srun"),
        (A_TASK, 2, r"devices=2.*SLURM `--ntasks-per-node=4` does not match.*by srun"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4, r"SLURM_NODEID is missing.*by srun, .*unset SLURM_NTASKS"),
    ],
)
def test_a_slurm_that_does_not_fit(pair_folder, model_file, tmp_path, monkeypatch, variables, devices, message):
    """More tasks than devices, fewer, and a job that srun has not started, so that its other variables are missing."""
    for name, value in ({"SLURM_NTASKS": "4"} | variables).items():
        monkeypatch.setenv(name, value)
    assert re.search(message, refusal(pair_folder, model_file, tmp_path / "run", "--devices", str(devices)))


def test_errors_of_other_code_keep_their_traceback(pair_folder, model_file, tmp_path, monkeypatch):
    """What Lightning did not raise itself is no misuse of it."""

    def broken(*_: Any) -> None:
        raise ValueError("of this package")

    monkeypatch.setattr("train_clip.training.module.ContrastiveModule.training_step", broken)
    with pytest.raises(ValueError, match="of this package"):
        run_train(pair_folder, model_file, tmp_path / "run")
