"""Adapted models through the commands: fine-tuned, resumed, evaluated, embedded, shown, written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import constants

import train_clip
from tests.adapters.tiny_families import CAPTIONS, CONTEXT, HERE, pairs, save
from tests.conftest import said
from train_clip import cli
from train_clip.adapters.families import FAMILIES
from train_clip.checkpoints.own import read_checkpoint

SHORT = "--folder data --batch_size 4 --accelerator cpu --val_share 0.2 --num_workers 0 --log_every_n_steps 1".split()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for some pairs."""
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("name", HERE)
def test_from_the_hubs_files_and_back(name, here, capsys):
    """Train, then evaluate, embed, inspect and convert the checkpoint, without the files that it began with."""
    save(name, here / "m")
    cli.main(["train", "--pretrained", "m", *SHORT, "--epochs", "2", "--output", "run"])
    shutil.rmtree("m")
    last = "run/checkpoints/last.ckpt"
    cli.main(["evaluate", last, "--folder", "data", "--json", "scores.json"])
    cli.main(["embed", last, "--folder", "data", "--output", "e.npz"])
    cli.main(["inspect", last])
    shown = capsys.readouterr().out
    assert "R@1" in shown and FAMILIES[name].model in shown
    cli.main(["convert", last, "back", "--to", "huggingface"])
    ours, back = train_clip.load(last), train_clip.load("back")
    files = sorted(Path("data").glob("*.png"))
    for items in files, CAPTIONS:
        torch.testing.assert_close(
            ours.encode(items, as_tensor=True), back.encode(items, as_tensor=True), atol=1e-5, rtol=0
        )
    np.testing.assert_allclose(np.load("e.npz")["embeddings"], ours.encode(files), atol=1e-5)
    model = hf.AutoModel.from_pretrained("back").eval()
    scale = 1 / model.temperature if name == "align" else model.logit_scale.exp()
    torch.testing.assert_close(scale.detach().squeeze(), ours.model.logit_scale.exp().detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_resumed_runs_end_as_whole_ones(verb, here):
    """From the second step on, without the files that the run began with, to the end of the run that never stopped."""
    save("siglip", here / "m")
    cli.main(
        [verb, "--pretrained", "m", *SHORT, "--epochs", "2", "--save_every", "1", "--keep", "9", "--output", "run"]
    )
    shutil.rmtree("m")
    cli.main([verb, "--resume", "run/checkpoints/step-00000002.ckpt", "--output", "other"])
    whole, parts = (read_checkpoint(Path(run, "checkpoints", "last.ckpt"))["state_dict"] for run in ("run", "other"))
    assert whole.keys() == parts.keys()
    for part, tensor in whole.items():
        assert torch.equal(tensor, parts[part])
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--resume", "run", "--epochs", "3", "--loss", "softmax"])
    assert "loss softmax, was sigmoid" in said(stop)
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--resume", "run", "--epochs", "3", "--image_size", "64"])
    assert "image_size 64, was None" in said(stop)


def test_module_loads_from_its_checkpoint(here):
    """``load_from_checkpoint`` without arguments, in this package's and Lightning's own way."""
    from train_clip.adapters.wrapper import AdapterWrapper

    save("chinese_clip", here / "m")
    cli.main(["finetune", "--pretrained", "m", *SHORT, "--max_steps", "1", "--output", "run"])
    shutil.rmtree("m")
    module = AdapterWrapper.load_from_checkpoint("run/checkpoints/last.ckpt")
    ours = train_clip.load("run/checkpoints/last.ckpt")
    torch.testing.assert_close(module.embed_texts(CAPTIONS), ours.encode(CAPTIONS, as_tensor=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["open_clip", "safetensors"])
def test_other_formats_are_refused(kind, here):
    save("siglip", here / "m")
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "m", "out", "--to", kind])
    assert "--to huggingface" in said(stop) and not Path("out").exists()


def test_merged(here):
    """Half-way between the start and the end, as of a CLIP."""
    save("siglip", here / "m")
    cli.main(["train", "--pretrained", "m", *SHORT, "--max_steps", "2", "--output", "run"])
    cli.main(["merge", "m", "run/checkpoints/last.ckpt", "--folder", "data", "--output", "merged"])
    start, end, middle = (
        train_clip.load(one).model.state_dict() for one in ("m", "run/checkpoints/last.ckpt", "merged/merged-0.5.ckpt")
    )
    for part, tensor in middle.items():
        torch.testing.assert_close(tensor, (start[part] + end[part]) / 2, atol=1e-6, rtol=1e-5)


def test_a_loss_that_was_told_is_the_next_runs(here):
    """A softmax family trained with the sigmoid loss: its checkpoint keeps loss and bias, its own files cannot."""
    save("chinese_clip", here / "m")
    cli.main(["train", "--pretrained", "m", *SHORT, "--max_steps", "1", "--loss", "sigmoid", "--output", "run"])
    cli.main(["train", "--pretrained", "run", *SHORT, "--max_steps", "1", "--output", "next"])
    for run in "run", "next":
        assert train_clip.load(run).model.logit_bias is not None
    with pytest.warns(UserWarning, match="has no logit_bias"):
        cli.main(["convert", "run", "back", "--to", "huggingface"])
    assert train_clip.load("back").model.logit_bias is None


@pytest.mark.parametrize("name", ["siglip", "chinese_clip", "align"])
def test_features_of_a_probe(name, here):
    """What the projection takes, or the feature itself where there is none; and labels by ``classify``."""
    from train_clip.probes.features import tapped

    model = save(name, here / "m")
    ours = train_clip.load("m")
    pixels = torch.stack([ours.preprocess(file) for file in sorted(Path("data").glob("*.png"))])
    with torch.no_grad(), tapped(ours.model) as taken:
        embeddings = ours.model.encode_image(pixels)
        torch.testing.assert_close(taken.pop(), model.vision_model(pixels).pooler_output, atol=1e-5, rtol=1e-5)
    assert len(embeddings) == len(pixels)
    Path("classes.txt").write_text("dog\nhouse\n")
    cli.main("classify m --folder data --classes classes.txt --output labels.csv".split())
    assert len(Path("labels.csv").read_text().splitlines()) == 1 + len(pixels)


def test_siglips_own_tokenizer(here):
    """A SentencePiece model, which lies in the checkpoint whole: trained, written and read without the first files."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = save("siglip", here / "m")
    for file in Path("m").glob("tokenizer*"):
        file.unlink()
    Path("texts").write_text("\n".join(f"a photo of the red house number {place}" for place in range(99)))
    how = {"vocab_size": 40, "pad_id": -1, "bos_id": -1, "eos_id": 1, "unk_id": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(input="texts", model_prefix="spiece", minloglevel=2, **how)
    theirs = hf.SiglipTokenizer("spiece.model", model_max_length=CONTEXT, model_input_names=["input_ids"])
    assert len(theirs) <= model.config.text_config.vocab_size
    theirs.save_pretrained("m")
    captions = ["A photo of the RED house!", "house, number 7", "x" * 50]
    expected = theirs(captions, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    cli.main(["train", "--pretrained", "m", *SHORT, "--max_steps", "1", "--output", "run"])
    shutil.rmtree("m"), Path("spiece.model").unlink()
    for source in "run", "back":
        ours = train_clip.load(source)
        assert ours.tokenizer(captions).keys() == {"input_ids"}
        assert torch.equal(ours.tokenizer(captions)["input_ids"], expected["input_ids"])
        if source == "run":
            cli.main(["convert", "run", "back", "--to", "huggingface"])


def test_a_name_on_the_hub(here, monkeypatch):
    """Files of the hub's cache, by ``hf-hub:NAME``: the features of the same files in a folder."""
    model = here / "cache" / "models--someone--siglip"
    save("siglip", model / "snapshots" / "0123")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    (model / ".no_exist" / "0123").mkdir(parents=True)
    for name in (
        "open_clip_config.json",
        "processor_config.json",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    ):
        (model / ".no_exist" / "0123" / name).touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(here / "cache"), raising=False)  # before 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    named, local = train_clip.load("hf-hub:someone/siglip"), train_clip.load(model / "snapshots" / "0123")
    assert named.model.name == "siglip"
    assert torch.equal(named.encode(CAPTIONS, as_tensor=True), local.encode(CAPTIONS, as_tensor=True))
