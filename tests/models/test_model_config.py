"""Configurations: what is accepted, and what an error says. Reference: the wording that a user needs to go on."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import yaml

from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, config_from_dict, presets, read_config

SMALL: dict[str, Any] = {
    "name": "small",
    "embed_dim": 16,
    "image": {"size": 32, "patch": 8, "layers": 2, "width": 24, "heads": 3},
    "text": {"context": 12, "vocab": 50, "layers": 2, "width": 20, "heads": 5},
    "optimizer": {
        "lr": 0.001,
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "warmup_steps": 10,
        "epochs": 3,
    },
    "activation": "gelu",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
}
RESNET = {"size": 64, "blocks": [1, 2, 1, 1], "width": 8}

# What train-CLIP's models/configs/ViT.yaml and RN.yaml hold under a model's name (here with the paper's stem width).
FLAT_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
}
FLAT_VIT = FLAT_TEXT | {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 32,
}
FLAT_RESNET = FLAT_TEXT | {
    "embed_dim": 1024,
    "image_resolution": 224,
    "vision_layers": [3, 4, 6, 3],
    "vision_width": 64,
    "vision_patch_size": 0,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The small configuration with one value replaced; ``image.size`` names a place."""
    values = copy.deepcopy(SMALL)
    *sections, key = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[key] = value
    return values


def without(path: str) -> dict[str, Any]:
    """The small configuration with one key left out."""
    values = changed(path, None)
    *sections, key = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    del target[key]
    return values


def test_own_file(tmp_path):
    """A YAML file of one's own gives the model that it describes, by its path, and goes back into the same file."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    config = read_config(str(path))
    assert config.to_dict() == SMALL
    assert config == config_from_dict(config.to_dict()) == config_from_dict(SMALL)
    assert CLIP(config).pixel_norm.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert config.image.size == 32 and config.optimizer.betas == (0.9, 0.98)
    assert CLIP(config).visual.proj.shape == (24, 16)


def test_a_file_made_from_a_preset_has_its_own_name(tmp_path):
    """Not the preset's, whose sizes it need not have; another name in it counts, and in a run's copy any does."""
    values = read_config("ViT-B/32").to_dict()
    for file, name, expected in (
        ("mine.yaml", "ViT-B/32", "mine"),
        ("mine.yaml", "cats", "cats"),
        ("mine.yaml", None, "mine"),
        ("model.yaml", "ViT-B/32", "ViT-B/32"),
    ):
        given = values | {"name": name} if name else {key: values[key] for key in set(values) - {"name"}}
        (tmp_path / file).write_text(yaml.safe_dump(given))
        config = read_config(str(tmp_path / file))
        assert config.name == expected
        assert config.sizes == read_config("ViT-B/32").sizes


def test_own_resnet_file(tmp_path):
    """``blocks`` instead of ``patch`` makes a ResNet; lists come back as lists."""
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(changed("image", RESNET)))
    config = read_config(str(path))
    assert config.image.blocks == (1, 2, 1, 1)
    assert config.to_dict()["image"] == RESNET
    assert CLIP(config).visual.attnpool.c_proj.weight.shape == (16, 32 * 8)


def test_defaults(tmp_path):
    """Name from the file's stem, activation quick_gelu, optimizer numbers ViT-B/32's."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: SMALL[key] for key in ("embed_dim", "image", "text")}))
    config = read_config(str(path))
    assert (config.name, config.activation) == ("mine", "quick_gelu")
    assert config.optimizer == read_config("ViT-B/32").optimizer


@pytest.mark.parametrize(("flat", "preset"), [(FLAT_VIT, "ViT-B/32"), (FLAT_RESNET, "RN50")])
def test_flat_form(flat, preset):
    """train-CLIP's flat dict of a paper's model gives the preset's sizes."""
    config = config_from_dict(flat)
    expected = read_config(preset)
    assert (config.embed_dim, config.image, config.text) == (expected.embed_dim, expected.image, expected.text)
    assert config.activation == expected.activation


@pytest.mark.parametrize("key", sorted(FLAT_VIT.keys() - {"image_resolution"}))
def test_flat_form_with_a_key_missing(key):
    """A key that is missing from the flat form is named, like one that is missing from a preset's."""
    with pytest.raises(UserError, match=key):
        config_from_dict({name: value for name, value in FLAT_VIT.items() if name != key})


def test_flat_form_with_an_unknown_key():
    """A key that the flat form does not have is refused and the valid ones listed, like in a preset's form."""
    with pytest.raises(UserError, match=r"vision_heads.*vision_width"):
        config_from_dict(FLAT_VIT | {"vision_heads": 6})


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("embeddim", ["embed_dim", "image", "text", "optimizer", "activation"]),
        ("image.depth", ["size", "patch", "layers", "width", "heads"]),
        ("text.length", ["context", "vocab", "layers", "width", "heads"]),
        ("optimizer.momentum", ["lr", "betas", "eps", "weight_decay", "warmup_steps", "epochs"]),
    ],
)
def test_unknown_key(path, known):
    """The error names the key, the place, and each key that is valid there."""
    with pytest.raises(UserError) as caught:
        config_from_dict(changed(path, 1), "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml: ") and repr(path.split(".")[-1]) in message
    assert all(key in message for key in known)


def test_unknown_key_beside_blocks():
    """A ResNet's valid keys are a ResNet's: ``patch`` and ``heads`` are refused."""
    with pytest.raises(UserError, match=r"'patch'.*size, blocks, width"):
        config_from_dict(changed("image", RESNET | {"patch": 8}))


@pytest.mark.parametrize(
    "path", ["embed_dim", "image", "image.size", "image.patch", "text", "text.vocab", "text.heads", "optimizer.lr"]
)
def test_missing_key(path):
    """The error names the key that is missing, and how to see a complete file."""
    with pytest.raises(UserError, match=path.split(".")[-1]) as caught:
        config_from_dict(without(path))
    assert "missing" in str(caught.value) and "--show ViT-B/32" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("image.size", 33, "33 is not a multiple of the patch 8"),
        ("image.heads", 5, "image width 24 is not a multiple of the 5 heads"),
        ("text.heads", 3, "text width 20 is not a multiple of the 3 heads"),
        ("image", RESNET | {"size": 48}, "48 is not a multiple of 32"),
        ("image", RESNET | {"blocks": [1, 1, 1]}, "expected a list of 4 numbers"),
        ("image", RESNET | {"width": 7}, "width 7 is odd"),
    ],
)
def test_sizes_that_do_not_fit(path, value, words):
    """Sizes that no network can have are refused with the numbers in question."""
    with pytest.raises(UserError, match=words):
        config_from_dict(changed(path, value))


@pytest.mark.parametrize("path", ["image.patch", "image.heads", "text.heads"])
def test_zero(path):
    """A size of 0 stops with a message, not with a division."""
    with pytest.raises(UserError, match=path.split(".")[-1]):
        config_from_dict(changed(path, 0))


@pytest.mark.parametrize(
    ("path", "value"),
    [("optimizer.lr", "5e-4"), ("optimizer.betas", [0.9]), ("image.size", "32"), ("text.layers", 2.5)],
)
def test_value_of_the_wrong_kind(path, value):
    """A value of the wrong type or length is refused by its key. YAML reads ``lr: 5e-4`` as a string."""
    with pytest.raises(UserError, match=path.split(".")[-1]):
        config_from_dict(changed(path, value))


def test_unknown_activation():
    """The error lists the activations that there are."""
    with pytest.raises(UserError, match=r"'relu'.*quick_gelu, gelu"):
        CLIP(config_from_dict(changed("activation", "relu")))


def test_unknown_preset():
    """The error lists every preset by name, and says that a file serves too."""
    with pytest.raises(UserError) as caught:
        read_config("ViT-B/31")
    assert all(config.name in str(caught.value) for config in presets())
    assert "YAML" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("- 1\n- 2\n", "list"), ("", "NoneType"), ("a: [1", "not YAML"), ("plain", "str")]
)
def test_file_that_holds_no_model(tmp_path, text, words):
    """A file that is not YAML, or holds no keys, is named together with what it holds."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_config(str(path))
    assert str(path) in str(caught.value)


def test_file_that_is_not_there(tmp_path):
    """A path that ends in .yaml and does not exist is not taken for a preset's name."""
    with pytest.raises(UserError, match=r"No such file.*Expected a preset"):
        read_config(str(tmp_path / "absent.yaml"))


def test_with_sizes():
    """Only the size changes, and it has to fit the patch."""
    config = config_from_dict(SMALL)
    larger = config.with_sizes(64)
    assert larger.image.size == 64
    assert larger.with_sizes(32) == config
    with pytest.raises(UserError, match="multiple"):
        config.with_sizes(60)


def test_frozen():
    """A configuration does not change after it was read."""
    config = config_from_dict(SMALL)
    for part in (config, config.image, config.text, config.optimizer):
        assert dataclasses.is_dataclass(part)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, next(iter(vars(part))), 1)
    assert isinstance(config, ModelConfig)
