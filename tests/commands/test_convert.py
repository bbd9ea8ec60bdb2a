"""``train-clip convert``, ``inspect`` and ``--pretrained``: one model through every format, and back into training."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

import train_clip
from tests.conftest import TINY, write_pairs
from tests.encoders import save_bert, save_resnet
from train_clip import cli
from train_clip.checkpoints.own import read_checkpoint
from train_clip.commands.convert import write_model

RESNET = TINY | {"image": {"size": 32, "blocks": [1, 1, 1, 1], "width": 8}}
SHORT = "--folder data --batch_size 4 --accelerator cpu --val_share 0 --max_steps 1 --num_workers 0".split()
KINDS = {"open_clip": "open_clip", "huggingface": "huggingface", "safetensors": "model.safetensors"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small ViT with an activation and colours that are not the default, and its model in every format."""
    folder = tmp_path_factory.mktemp("convert")
    write_pairs(folder / "data", 12)
    colours = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"activation": "gelu"} | colours))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["train", "--model_name", "tiny.yaml", *SHORT, "--output", "run"])
        for kind, target in KINDS.items():
            cli.main(["convert", "run/checkpoints/last.ckpt", target, "--to", kind])
    return folder


@pytest.fixture
def here(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("target", KINDS.values())
def test_a_model_comes_back_bit_for_bit(here, target):
    """Sizes, activation, colours and every tensor, against the run's own checkpoint."""
    model, preprocess, _ = train_clip.load(target)
    state = read_checkpoint(Path("run/checkpoints/last.ckpt"))["state_dict"]
    assert {f"model.{name}" for name in model.state_dict()} == set(state)
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in model.state_dict().items())
    expected = train_clip.read_config("run/model.yaml")
    config = model.config
    assert (config.embed_dim, config.image, config.text) == (expected.embed_dim, expected.image, expected.text)
    assert (config.activation, config.mean, config.std) == ("gelu", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    torch.testing.assert_close(preprocess.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))


@pytest.mark.parametrize("target", KINDS.values())
def test_every_format_has_the_same_scores(here, capsys, tmp_path, target):
    """``evaluate`` of the file against ``evaluate`` of the checkpoint."""
    scores = []
    for source in ("run/checkpoints/last.ckpt", target):
        cli.main(["evaluate", source, "--folder", "data", "--json", str(tmp_path / "scores.json")])
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0] == scores[1]


@pytest.mark.parametrize("verb", ["train", "finetune"])
@pytest.mark.parametrize("target", KINDS.values())
def test_training_begins_with_the_weights(here, tmp_path, verb, target):
    """At a rate of next to nothing a step leaves them what they were, and no optimizer state is taken along."""
    output = tmp_path / "out"
    cli.main([verb, "--pretrained", target, *SHORT, "--learning_rate", "1e-30", "--output", str(output)])
    begun, state = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (output, Path("run")))
    assert begun["global_step"] == 1
    for name, value in state["state_dict"].items():
        torch.testing.assert_close(begun["state_dict"][name], value, rtol=0, atol=1e-12)


def test_another_size_is_trained_repeated_and_resumed(here, tmp_path, monkeypatch):
    """``--image_size``, ``--context_length`` beside ``--pretrained``: again by the run's config, and ``--resume``."""
    words = "--pretrained open_clip --image_size 32 --context_length 8".split()
    cli.main(["train", *words, *SHORT, "--output", str(tmp_path / "first")])
    cli.main(["train", "--config", str(tmp_path / "first" / "config.yaml"), "--output", str(tmp_path / "again")])
    cli.main(["train", "--resume", str(tmp_path / "first"), "--max_steps", "2"])
    first = read_checkpoint(tmp_path / "first" / "checkpoints" / "step-00000001.ckpt")["state_dict"]
    again = read_checkpoint(tmp_path / "again" / "checkpoints" / "last.ckpt")["state_dict"]
    assert first["model.visual.positional_embedding"].shape == (17, 16)
    assert first["model.positional_embedding"].shape == (8, 16)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert read_checkpoint(tmp_path / "first" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_resnet_goes_everywhere_but_to_huggingface(here, tmp_path, capsys):
    """Its running statistics too; the refusal says why and what to do instead."""
    (tmp_path / "resnet.yaml").write_text(yaml.safe_dump(RESNET))
    run = tmp_path / "run"
    cli.main(["train", "--model_name", str(tmp_path / "resnet.yaml"), *SHORT, "--output", str(run)])
    source, state = run / "checkpoints" / "last.ckpt", read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    for kind, target in (("open_clip", "oc"), ("safetensors", "one.safetensors")):
        cli.main(["convert", str(source), str(tmp_path / target), "--to", kind])
        loaded = train_clip.load(tmp_path / target).model.state_dict()
        assert all(torch.equal(value, state[f"model.{name}"]) for name, value in loaded.items())
    with pytest.raises(SystemExit, match=r"is a ResNet, and Hugging Face's CLIPModel has vision transformers only"):
        cli.main(["convert", str(source), str(tmp_path / "hf"), "--to", "huggingface"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["oc", "one.safetensors", "resnet.yaml", "run"]


@pytest.fixture(scope="module")
def joined(made) -> Path:
    """A run of two encoders."""
    save_resnet(made / "resnet"), save_bert(made / "bert")
    words = ["--image_encoder", f"hf:{made / 'resnet'}", "--text_encoder", f"hf:{made / 'bert'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        cli.main(["finetune", *words, *SHORT, "--output", "joined"])
    return made / "joined" / "checkpoints" / "last.ckpt"


def test_two_encoders_load_but_go_nowhere_else(here, joined, tmp_path):
    """``load`` embeds as the module does; convert and train say what to do instead."""
    model, preprocess, tokenizer = train_clip.load(joined)
    module = train_clip.CustomCLIPWrapper.load_from_checkpoint(joined).eval()
    with torch.no_grad():
        texts = torch.nn.functional.normalize(model.encode_text(tokenizer(["picture 3", "a"])), dim=-1)
        images = torch.nn.functional.normalize(model.encode_image(preprocess("data/003.png")[None]), dim=-1)
    torch.testing.assert_close(texts, module.embed_texts(["picture 3", "a"]))
    torch.testing.assert_close(images, module.embed_images("data/003.png"))
    with pytest.raises(SystemExit, match="two encoders joined by this package, which no other format can hold"):
        cli.main(["convert", str(joined), str(tmp_path / "out"), "--to", "safetensors"])
    with pytest.raises(SystemExit, match="two encoders, which `train-clip finetune --pretrained` trains on"):
        cli.main(["train", "--pretrained", str(joined), *SHORT])
    with pytest.raises(SystemExit, match="train-clip checkpoint, whose sizes and activations are fixed"):
        cli.main(["evaluate", str(joined), "--folder", "data", "--image_size", "64"])


@pytest.mark.parametrize("kind", ["open_clip", "huggingface"])
def test_a_folder_has_its_name_once_all_of_it_is_on_disk(made, tmp_path, monkeypatch, kind):
    """Every file and the folder are synced before the rename: a folder that is there after a crash is whole."""
    synced: set[int] = set()
    fsync, replace = os.fsync, Path.replace

    def sync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def look(beside: Path, target: Path) -> Path:
        files = beside.iterdir() if beside.is_dir() else ()
        assert {path.stat().st_ino for path in (beside, *files)} <= synced
        return replace(beside, target)

    monkeypatch.setattr(os, "fsync", sync), monkeypatch.setattr(Path, "replace", look)
    write_model(train_clip.load(made / "open_clip").model, tmp_path / "out", kind)
    assert (tmp_path / "out").is_dir()


def test_everyone_may_read_what_the_umask_lets_them(here, tmp_path):
    """Every file of a run, and of it in each format."""
    source, before = "run/checkpoints/last.ckpt", os.umask(0o027)
    try:
        cli.main(["train", "--pretrained", source, *SHORT, "--ema", "0.9", "--output", str(tmp_path / "run")])
        for kind in KINDS:
            cli.main(["convert", source, str(tmp_path / kind), "--to", kind])
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(modes) > 20
    assert {path: mode for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def test_what_is_there_is_never_replaced(here):
    """A target that exists, a file or a folder, empty or not."""
    with pytest.raises(SystemExit, match="data: already exists, and is not overwritten"):
        cli.main(["convert", "run/checkpoints/last.ckpt", "data", "--to", "open_clip"])


def test_what_inspect_tells(here, joined, capsys):
    """The step and the numbers of a run, the sizes and the activation of each format, the names of two encoders."""
    cli.main(["inspect", "run/checkpoints/last.ckpt"])
    said = capsys.readouterr().out
    for line in (
        r"format +train-clip checkpoint \(PyTorch archive, [\d.]+ MiB\)",
        r"model +tiny",
        r"image tower +ViT of 2 layers of 16, 2 heads, patches of 8 pixels, 16×16 pixels",
        r"text tower +2 layers of 16, 2 heads, 16 tokens of 49,408",
        r"activation +gelu",
        r"step +1",
        r"trained with .*learning_rate 0\.001, weight_decay 0\.1, betas \[0\.9, 0\.98\]",
    ):
        assert re.search(line, said), line
    number = sum(tensor.numel() for tensor in train_clip.load("open_clip").model.parameters())
    for target, name in (("open_clip", "open_clip"), ("huggingface", "Hugging Face CLIPModel")):
        cli.main(["inspect", target])
        said = capsys.readouterr().out
        assert re.search(rf"format +{name} \(safetensors, .*\n", said)
        assert f"{number:,} parameters" in said and "activation   gelu" in said
    cli.main(["inspect", str(joined)])
    assert re.search(r"image_encoder +hf:.*resnet\ntext_encoder +hf:.*bert\n", capsys.readouterr().out)


def test_what_inspect_does_not_know(here, tmp_path, capsys):
    """A state dict by itself does not say its activation, nor the heads of a model of no known sizes."""
    torch.save(train_clip.load("open_clip").model.state_dict(), tmp_path / "weights.pt")
    cli.main(["inspect", str(tmp_path / "weights.pt")])
    assert "not stated in the file; the file does not state the number of heads" in capsys.readouterr().out
    words = ["--model_name", "tiny.yaml", "--activation", "gelu"]
    cli.main(
        ["convert", str(tmp_path / "weights.pt"), str(tmp_path / "out.safetensors"), "--to", "safetensors", *words]
    )
    assert train_clip.load(tmp_path / "out.safetensors").model.config.activation == "gelu"
