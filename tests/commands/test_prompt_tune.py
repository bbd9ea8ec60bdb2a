"""``train-clip prompt-tune``, as it is typed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests import forked
from tests.conftest import TINY, said, write_pairs
from train_clip import cli
from train_clip.checkpoints.own import read_checkpoint

RESNET = TINY | {"image": {"size": 32, "blocks": [1, 1, 1, 1], "width": 8}}
DATA = "--folder data --batch_size 4 --accelerator cpu --num_workers 0".split()
FEW = ["--prompts", "3"]
BACKBONE = "clip/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and a run of two epochs with a fifth of twelve pairs held out."""
    folder = tmp_path_factory.mktemp("prompts")
    write_pairs(folder / "data", 12)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "resnet.yaml").write_text(yaml.safe_dump(RESNET))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("tiny", "resnet"):
            words = ["--model_name", f"{name}.yaml", "--max_steps", "1", "--val_share", "0"]
            cli.main(["train", *DATA, *words, "--output", {"tiny": "clip", "resnet": "resnet"}[name]])
        words = "--val_share 0.2 --epochs 2 --output run".split()
        cli.main(["prompt-tune", "--pretrained", BACKBONE, *DATA, *FEW, *words])
    return folder


@pytest.fixture
def here(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


def state(run: Path | str) -> dict:
    return read_checkpoint(Path(run, "checkpoints", "last.ckpt"))


def test_what_the_run_leaves(here, capsys, tmp_path):
    """Small checkpoints, the rate scaled by the batch, the backbone by its place; evaluate from anywhere."""
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["learning_rate"] == 25 * 4 / 256 and config["pretrained"] == str(Path(BACKBONE).resolve())
    assert set(state("run")["state_dict"]) == {
        "model.visual.prompts.0", "model.visual.prompts.1", "model.visual.backbone.class_embedding",
    }  # fmt: skip
    assert Path("run/checkpoints/last.ckpt").stat().st_size < Path(BACKBONE).stat().st_size / 100
    run = Path("run").resolve()
    os.chdir(tmp_path)
    cli.main(["evaluate", str(run / "checkpoints" / "best.ckpt"), "--folder", str(here / "data")])
    assert re.search(r"R@1 +\d", capsys.readouterr().out)


def test_the_rate_is_that_of_the_batch_that_there_is(here, tmp_path):
    """Twelve pairs where 256 are wanted: the rate of twelve."""
    words = ["--pretrained", BACKBONE, "--folder", "data", "--accelerator", "cpu", *FEW, "--val_share", "0"]
    cli.main(["prompt-tune", *words, "--max_steps", "1", "--output", str(tmp_path / "run")])
    assert state(tmp_path / "run")["hyper_parameters"]["learning_rate"] == 25 * 12 / 256


def test_a_loose_checkpoint_of_another_kind_is_refused(here):
    """``--resume`` of a checkpoint of train: a message; of prompts with other prompts asked for: likewise."""
    with pytest.raises(SystemExit, match="holds no prompts"):
        cli.main(["prompt-tune", "--resume", _copy(BACKBONE), *DATA])
    with pytest.raises(SystemExit, match="prompts 9, was 3"):
        cli.main(["prompt-tune", "--resume", _copy("run/checkpoints/last.ckpt"), *DATA, "--prompts", "9"])


def test_the_best_is_the_one_of_lowest_loss(here):
    """``best.ckpt`` is of the epoch whose validation loss is lowest, by the log."""
    import csv

    with Path("run/logs/metrics.csv").open() as file:
        losses = {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}
    best = read_checkpoint(Path("run/checkpoints/best.ckpt"))["global_step"]
    assert losses[best - 1] == min(losses.values())


def test_a_run_goes_on(here, tmp_path):
    """From its third step of nine, dropout and all, against the run that never stopped: 1e-6."""
    words = [
        "--pretrained",
        BACKBONE,
        *DATA,
        *FEW,
        "--val_share",
        "0",
        "--epochs",
        "3",
        "--save_every",
        "1",
        "--keep",
        "9",
    ]
    whole, other = tmp_path / "whole", tmp_path / "other"
    cli.main(["prompt-tune", *words, "--output", str(whole)])
    kept = whole / "checkpoints" / "step-00000003.ckpt"
    cli.main(["prompt-tune", "--resume", str(kept), "--output", str(other)])
    assert state(other)["global_step"] == state(whole)["global_step"] == 9
    for name, value in state(whole)["state_dict"].items():
        torch.testing.assert_close(state(other)["state_dict"][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrained other.safetensors", "not those of the backbone that this was trained with"),
        ("--prompts 4", "prompts 4, was 3"),
        ("--prompt_kind shallow", "prompt_kind shallow, was deep"),
        ("--class_token false", "class_token False, was True"),
        ("--image_size 32", "image_size 32, was None"),
    ],
)
def test_what_a_resumed_run_cannot_change(here, words, message):
    """Its backbone and its prompts; nothing of the run is touched."""
    if not Path("other.safetensors").exists():
        cli.main(["train", "--model_name", "tiny.yaml", *DATA, "--max_steps", "2", "--val_share", "0", "--output", "o"])
        cli.main(["convert", "o/checkpoints/last.ckpt", "other.safetensors", "--to", "safetensors"])
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as stop:
        cli.main(["prompt-tune", "--resume", "run", "--epochs", "3", *words.split()])
    assert message in said(stop)
    assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before


def test_a_run_whose_backbone_has_moved_goes_on(here, tmp_path):
    """``--pretrained`` names its new place; a checkpoint that lies in no run brings its prompts' options."""
    shutil.copytree("run", tmp_path / "run"), shutil.copytree("clip", tmp_path / "clip")
    shutil.copy("run/checkpoints/last.ckpt", tmp_path / "lone.ckpt")
    place = str(tmp_path / BACKBONE)
    cli.main(["prompt-tune", "--resume", str(tmp_path / "run"), "--epochs", "3", "--pretrained", place])
    assert state(tmp_path / "run")["hyper_parameters"]["backbone"] == place
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["pretrained"] == place
    words = [*DATA, "--val_share", "0.2", "--epochs", "3", "--output", str(tmp_path / "on")]
    cli.main(["prompt-tune", "--resume", str(tmp_path / "lone.ckpt"), *words])
    assert yaml.safe_load((tmp_path / "on" / "config.yaml").read_text())["prompts"] == 3


def test_the_script_and_the_recipe_words(here, tmp_path):
    """``python train_finetune_vpt.py`` is the verb; shallow prompts, chosen blocks, no class token, AdamW."""
    script = Path(__file__).parents[2] / "train_finetune_vpt.py"
    start = ["--pretrained", BACKBONE, *DATA, *FEW, "--val_share", "0", "--max_steps", "1"]
    words = [*"--prompt_kind shallow --class_token false --optimizer adamw --output".split(), str(tmp_path / "a")]
    subprocess.run([sys.executable, str(script), *start, *words], check=True, capture_output=True)
    assert set(state(tmp_path / "a")["state_dict"]) == {"model.visual.prompts.0"}
    assert state(tmp_path / "a")["hyper_parameters"]["prompts"]["dropout"] == 0.0
    cli.main(["prompt-tune", *start, "--prompt_layers", "[1]", "--output", str(tmp_path / "b")])
    assert set(state(tmp_path / "b")["state_dict"]) == {
        "model.visual.prompts.1", "model.visual.backbone.class_embedding",
    }  # fmt: skip


def test_two_processes_tune_as_one(here, tmp_path):
    """A step of each, with dropout off: the same prompts to 1e-6."""
    words = ["--pretrained", BACKBONE, *DATA, *FEW, "--val_share", "0", "--max_steps", "2", "--prompt_dropout", "0"]
    for processes in (1, 2):
        call = ["prompt-tune", *words, "--devices", str(processes), "--output", str(tmp_path / str(processes))]
        forked.run(["-m", "train_clip.cli", *call], processes=processes, check=True)
    for name, value in state(tmp_path / "1")["state_dict"].items():
        torch.testing.assert_close(state(tmp_path / "2")["state_dict"][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrained resnet/checkpoints/last.ckpt", "a ResNet, which has no tokens"),
        ("--model_name tiny.yaml", "tiny.yaml: OpenAI has not published this model"),
        ("--pretrained run/checkpoints/last.ckpt", "train-clip visual prompts"),
        (f"--pretrained {BACKBONE} --prompts 0", "0 prompts; expected 1 or above"),
        (f"--pretrained {BACKBONE} --prompt_layers [5]", "Prompts at block 5"),
        (f"--pretrained {BACKBONE} --prompt_dropout 1.5", "A dropout of 1.5"),
    ],
)
def test_what_cannot_start_is_refused(here, words, message):
    """Each with a message, and nothing is written."""
    before = sorted(Path().iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main(["prompt-tune", *words.split(), *DATA, "--output", "never"])
    assert message in said(stop)
    assert sorted(Path().iterdir()) == before


def test_without_weights_it_is_openais_that_are_meant(here, caplog, monkeypatch, tmp_path):
    """The command as people know it, ``--model_name ViT-L/14`` alone: what is asked for, and where to put the file."""
    caplog.set_level("INFO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    with pytest.raises(SystemExit, match=r"OpenAI's ViT-L/14 is not in .*put it at .*ViT-L-14\.pt"):
        cli.main(["prompt-tune", "--model_name", "ViT-L/14", *DATA])
    assert "Prompts need a pretrained backbone" in caplog.text


def test_scores_of_prompts_and_of_a_moved_backbone(here, tmp_path):
    """``evaluate --backbone``: the same figures from the backbone's copy in another format."""
    cli.main(["convert", BACKBONE, str(tmp_path / "copy"), "--to", "open_clip"])
    found = []
    for words in ([], ["--backbone", str(tmp_path / "copy")]):
        target = tmp_path / f"scores{len(words)}.json"
        cli.main(["evaluate", "run/checkpoints/last.ckpt", "--folder", "data", "--json", str(target), *words])
        found.append(json.loads(target.read_text()))
    assert found[0] == found[1]


def _copy(checkpoint: str) -> str:
    target = Path("loose") / Path(checkpoint).parents[1].name / "x.ckpt"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(Path(checkpoint).read_bytes())
    return str(target)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")
