"""What cannot be loaded from a hub or a folder, and what is said about it; what can, quietly and without a network."""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from torch import nn

from tests.models.tiny_huggingface import (
    IMAGE_MODELS,
    MEAN,
    SIDE,
    STD,
    TEXT_ENDS,
    TEXT_MODELS,
    VISION,
    VOCAB,
    clip,
    saved,
)
from train_clip.encoders.encoder import Pixels
from train_clip.encoders.huggingface import build_text, live_image_encoder, load_image, load_text
from train_clip.errors import UserError


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_weights_that_are_not_in_the_file(tmp_path):
    """A layer more in the configuration than in the file: nothing stays random, the message lists and counts."""
    saved(TEXT_MODELS["bert"][0], tmp_path)
    edit_config(tmp_path, num_hidden_layers=3)
    message = r"do not fit. 16 of BertModel's tensors are not in the file, .*such as encoder.layer.2\..*\. Expected all"
    with pytest.raises(UserError, match=message):
        load_text(str(tmp_path))


def test_weights_of_another_shape(tmp_path):
    saved(TEXT_MODELS["bert"][0], tmp_path)
    edit_config(tmp_path, vocab_size=VOCAB + 1)
    message = r"1 of BertModel's tensors .* have another shape there, such as embeddings.word_embeddings.weight\."
    with pytest.raises(UserError, match=message):
        load_text(str(tmp_path))


def test_half_a_pooler_is_not_a_missing_one(tmp_path):
    """A pooler comes off only with nothing else missing."""
    model = saved(TEXT_MODELS["bert"][0], tmp_path)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    del weights["encoder.layer.0.output.dense.bias"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"3 of BertModel's tensors are not in the file"):
        load_text(str(tmp_path))


def test_the_other_kind_of_encoder(tmp_path):
    """A text model for images and the other way round."""
    saved(TEXT_MODELS["bert"][0], tmp_path / "bert")
    saved(IMAGE_MODELS["vit"][0], tmp_path / "vit", {"size": SIDE})
    with pytest.raises(
        UserError, match=r"its size is None .*; expected the side of a square.* Use an encoder for square images"
    ):
        load_image(str(tmp_path / "bert"))
    with pytest.raises(
        UserError,
        match=r"vit: ViTModel fails on input_ids and attention_mask \(.*\. Expected an encoder for this input\. Use",
    ):
        load_text(str(tmp_path / "vit"))


def test_an_encoder_with_a_decoder(tmp_path):
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    saved(lambda: hf.BartModel(hf.BartConfig(vocab_size=VOCAB, **TEXT_ENDS, **sizes, **heads)), tmp_path)
    with pytest.raises(UserError, match=r"bart is an encoder with a decoder; expected an encoder. Use one such as"):
        load_text(str(tmp_path))


def test_a_size_that_the_encoder_does_not_take(tmp_path):
    """A preprocessor of another size than the position table: the message gives the size."""
    saved(IMAGE_MODELS["vit"][0], tmp_path, {"size": 24, "image_mean": MEAN, "image_std": STD})
    with pytest.raises(UserError, match="fails on an image of 24 × 24 pixels"):
        load_image(str(tmp_path))


def test_an_encoder_that_hides_parts_of_its_input(tmp_path):
    """A masked autoencoder draws what it sees, in eval mode too."""
    values = {"size": SIDE, "image_mean": MEAN, "image_std": STD}
    saved(lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**VISION)), tmp_path, values)
    with pytest.raises(UserError, match="different features for the same image each time"):
        load_image(str(tmp_path))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"the text encoder cannot be loaded \(.*config.json"):
        load_text(str(tmp_path))
    for name in ("./nothing", str(tmp_path / "nothing"), "~/nothing", "a/b/c"):
        with pytest.raises(UserError, match=f"^hf:{name}: the text encoder is not a folder, not in"):
            load_text(name)


@pytest.mark.parametrize("content", ['{"model_type":', '{"model_type": "nonsense"}', "{}", "[]"])
def test_a_configuration_that_is_broken(content, tmp_path):
    """The message names the folder."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"^hf:{tmp_path}: the text encoder cannot be loaded .*Copy or download"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_weights_that_are_broken(keep, tmp_path):
    """A file that ends early: the message names the folder; so does a folder without weights."""
    saved(TEXT_MODELS["bert"][0], tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=f"^hf:{tmp_path}: the text encoder cannot be loaded .*Copy or download"):
        load_text(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match=f"^hf:{tmp_path}: the text encoder cannot be loaded"):
        load_text(str(tmp_path))


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_network(monkeypatch, cache):
    """What an offline session is told at once, and another one after its retries."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("load", "kind"), [(load_image, "image"), (load_text, "text")])
def test_a_name_without_network(load, kind, without_network):
    """The message gives the two commands that help."""
    with pytest.raises(UserError) as failure:
        load("nobody/nothing")
    message = str(failure.value)
    assert message.startswith(
        f"hf:nobody/nothing: the {kind} encoder is not a folder, not in this machine's cache, and cannot be down"
    )
    assert "`hf download nobody/nothing --local-dir FOLDER`" in message
    assert message.endswith("give hf:FOLDER.")


def test_a_name_in_the_cache(cache, monkeypatch):
    """What was downloaded once is read without asking the network for anything."""
    model = cache / "models--nobody--clip"
    folder = model / "snapshots" / "0123"
    original = saved(clip, folder, {"size": SIDE, "image_mean": MEAN, "image_std": STD})
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    absent = model / ".no_exist" / "0123"
    absent.mkdir(parents=True)
    for name in ("processor_config.json", "adapter_config.json"):  # looked for once, the latter where peft is installed
        (absent / name).touch()
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **how: asked.append(address))
    image, text = load_image("nobody/clip"), load_text("nobody/clip")
    assert not asked and (image.size, image.mean) == (SIDE, (*MEAN,))
    assert image.description["name"] == text.description["name"] == "nobody/clip"
    assert torch.equal(image.module.embeddings.class_embedding, original.vision_model.embeddings.class_embedding)


def test_code_beside_weights_is_not_run(tmp_path):
    """A model type that needs the folder's own code is refused without a question at the terminal."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}})
    )
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text(str(tmp_path))
    assert not ran.exists()


def test_loading_is_quiet(tmp_path, capfd):
    """Nothing is printed about unused weights or progress, and the library's own settings are as before."""
    saved(TEXT_MODELS["gpt2"][0], tmp_path)
    chatter = hf.utils.logging
    before = (chatter.get_verbosity(), chatter.is_progress_bar_enabled(), logging.root.level)
    capfd.readouterr()
    build_text(load_text(str(tmp_path)).description)
    assert "".join(capfd.readouterr()) == ""
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled(), logging.root.level) == before


def test_a_class_that_the_library_does_not_have(tmp_path):
    """Of another version, or of no model at all."""
    saved(TEXT_MODELS["bert"][0], tmp_path)
    description = load_text(str(tmp_path)).description
    for name in ("BertModelOfTheFuture", "AutoTokenizer", "logging"):
        with pytest.raises(UserError, match=rf"has no model {name}. Install transformers \d"):
            build_text({**description, "class": name})


def test_without_the_library(monkeypatch, tmp_path):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        load_image(str(tmp_path))
    assert live_image_encoder(nn.Flatten(), Pixels(2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))).description == {}
