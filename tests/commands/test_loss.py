"""``--loss sigmoid`` through the commands: a run and what goes on from it, its bias in every format, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import train_clip
from tests.conftest import TINY, write_pairs
from tests.encoders import save_bert, save_resnet
from train_clip import CLIPWrapper, cli
from train_clip.checkpoints.own import read_checkpoint
from train_clip.checkpoints.sources import OPEN_CLIP_CONFIG

SHORT = "--folder data --batch_size 4 --accelerator cpu --val_share 0.2 --log_every_n_steps 1 --num_workers 0".split()
SIGMOID = ["--loss", "sigmoid"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the sigmoid loss and one of the softmax; a run of two encoders."""
    folder = tmp_path_factory.mktemp("loss")
    write_pairs(folder / "data", 16)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    save_resnet(folder / "resnet"), save_bert(folder / "bert")
    encoders = ["--image_encoder", "hf:resnet", "--text_encoder", "hf:bert"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["train", "--model_name", "tiny.yaml", *SIGMOID, *SHORT, "--epochs", "1", "--output", "sigmoid"])
        cli.main(["train", "--model_name", "tiny.yaml", *SHORT, "--epochs", "1", "--output", "softmax"])
        cli.main(["finetune", *encoders, *SIGMOID, *SHORT, "--epochs", "1", "--output", "joined"])
    return folder


@pytest.fixture
def here(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


def last(run: Path | str) -> str:
    return str(Path(run) / "checkpoints" / "last.ckpt")


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    return read_checkpoint(Path(last(run)))["state_dict"]


def test_a_run_goes_on_with_its_loss(here, tmp_path, capsys):
    """``--resume`` without a word on the loss, and a run by the config that was kept; what is logged and inspected."""
    config = ["--config", "sigmoid/config.yaml"]
    cli.main(["train", *config, "--max_steps", "1", "--epochs", "2", "--output", str(tmp_path / "run")])
    cli.main(["train", "--resume", str(tmp_path / "run"), "--max_steps", "2"])
    assert "model.logit_bias" in weights(tmp_path / "run")
    assert "train/logit_bias" in Path("sigmoid/logs/metrics.csv").read_text()
    with pytest.raises(SystemExit, match="loss softmax, was sigmoid"):
        cli.main(["train", "--resume", str(tmp_path / "run"), "--max_steps", "3", "--loss", "softmax"])
    capsys.readouterr()
    cli.main(["inspect", last("sigmoid")])
    said = capsys.readouterr().out
    assert re.search(r"logits +with the bias of the sigmoid loss\n", said) and "loss sigmoid" in said
    cli.main(["inspect", last("softmax")])
    assert "bias" not in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "target"), [("open_clip", "oc"), ("safetensors", "one.safetensors")])
def test_the_bias_goes_through(here, tmp_path, kind, target):
    """Written and read back bit for bit, and trained on: from there it keeps its bias."""
    cli.main(["convert", last("sigmoid"), str(tmp_path / target), "--to", kind])
    found, state = train_clip.load(tmp_path / target).model.state_dict(), weights("sigmoid")
    assert {f"model.{name}" for name in found} == set(state)
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in found.items())
    if kind == "open_clip":
        config = json.loads((tmp_path / target / OPEN_CLIP_CONFIG).read_text())["model_cfg"]
        assert config["init_logit_bias"] == -10 and config["init_logit_scale"] == pytest.approx(2.302585)
    words = [*SIGMOID, *SHORT, "--max_steps", "1", "--learning_rate", "1e-30", "--output", str(tmp_path / "run")]
    cli.main(["train", "--pretrained", str(tmp_path / target), *words])
    assert torch.equal(weights(tmp_path / "run")["model.logit_bias"], state["model.logit_bias"])
    assert torch.equal(weights(tmp_path / "run")["model.logit_scale"], state["model.logit_scale"])


def test_huggingface_has_no_place_for_it(here, tmp_path):
    """It is left out, which is said; the rest comes back, and ranks as before."""
    with pytest.warns(UserWarning, match=r"Hugging Face's CLIPModel has no logit_bias; -\d+\.\d+ is dropped"):
        cli.main(["convert", last("sigmoid"), str(tmp_path / "hf"), "--to", "huggingface"])
    found, state = train_clip.load(tmp_path / "hf").model.state_dict(), weights("sigmoid")
    assert set(state) - {f"model.{name}" for name in found} == {"model.logit_bias"}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in found.items())


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_from_one_loss_to_the_other(here, tmp_path, name, caplog):
    """Of softmax weights the towers are taken alone; a bias that is not wanted is left out. Both are said."""
    caplog.set_level("INFO")
    words = [*SHORT, "--max_steps", "1", "--learning_rate", "1e-30"]
    cli.main([name, "--pretrained", last("softmax"), *words, *SIGMOID, "--output", str(tmp_path / "to-sigmoid")])
    assert "has no logit_bias" in caplog.text
    found = weights(tmp_path / "to-sigmoid")
    assert found["model.logit_bias"].item() == -10 and found["model.logit_scale"].exp().item() == pytest.approx(10)
    cli.main([name, "--pretrained", last("sigmoid"), *words, "--output", str(tmp_path / "to-softmax")])
    assert "its logit_bias, of the sigmoid loss, is dropped" in caplog.text
    assert "model.logit_bias" not in weights(tmp_path / "to-softmax")


def test_two_encoders(here, tmp_path, capsys):
    """Built again with their bias by ``load``; trained on with it, and by the softmax loss without."""
    model = train_clip.load(last("joined")).model
    assert torch.equal(model.logit_bias, weights("joined")["model.logit_bias"])
    assert model.logit_bias.item() != -10  # it was trained, with the teacher beside
    cli.main(["evaluate", last("joined"), "--folder", "data"])
    words = [*SHORT, "--max_steps", "1", "--learning_rate", "1e-30", "--distillation", "none"]
    for loss in ("sigmoid", "softmax"):
        run = tmp_path / loss
        cli.main(["finetune", "--pretrained", last("joined"), *words, "--loss", loss, "--output", str(run)])
        assert ("model.logit_bias" in weights(run)) == (loss == "sigmoid")
    assert torch.equal(weights(tmp_path / "sigmoid")["model.logit_bias"], model.logit_bias)


def test_towers_of_such_a_checkpoint(here, tmp_path):
    """Joined anew they bring neither temperature nor bias."""
    tower = f"train-clip:{last('sigmoid')}"
    words = ["--image_encoder", tower, "--text_encoder", tower, *SHORT, "--max_steps", "1"]
    cli.main(["finetune", *words, "--output", str(tmp_path / "run")])
    assert not any("logit_bias" in name for name in weights(tmp_path / "run"))


def test_merged_with_what_was_trained_by_the_other_loss(here, tmp_path):
    """Towers lie on the line; temperature and bias are the tuned model's."""
    for start, tuned in (("softmax", "sigmoid"), ("sigmoid", "softmax")):
        target = tmp_path / tuned
        cli.main(["merge", last(start), last(tuned), "--folder", "data", "--output", str(target)])
        merged, begin, end = (
            CLIPWrapper.load_from_checkpoint(target / "merged-0.5.ckpt").state_dict(),
            *map(weights, (start, tuned)),
        )
        assert merged.keys() == end.keys()
        assert torch.equal(merged["model.logit_scale"], end["model.logit_scale"])
        assert ("model.logit_bias" in merged) == (tuned == "sigmoid")
        name = "model.text_projection"
        torch.testing.assert_close(merged[name], (begin[name] + end[name]) / 2)
