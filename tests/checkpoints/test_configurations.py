"""open_clip's and Hugging Face's configurations that are not CLIP's, or nothing at all: each refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.by_hand import look, tiny_clip
from train_clip import load
from train_clip.commands.convert import write_model
from train_clip.errors import UserError


def refused(source: Path, *expected: str) -> None:
    """The source and the words stand in the message."""
    with pytest.raises(UserError) as caught:
        load(source)
    for word in (str(source), *expected):
        assert word in str(caught.value)


OF_OPEN_CLIP = {
    "a tower of timm": (("model_cfg", "vision_cfg", "timm_model_name"), "vit_base", "timm"),
    "a text tower of others": (("model_cfg", "text_cfg", "hf_model_name"), "roberta", "hf_model_name"),
    "a setting that is unknown": (("model_cfg", "vision_cfg", "no_such_setting"), 1, "no_such_setting"),
    "another pooling": (("model_cfg", "vision_cfg", "pool_type"), "avg", "pool_type"),
    "another ratio": (("model_cfg", "text_cfg", "mlp_ratio"), 2.0, "mlp_ratio"),
    "another interpolation": (("preprocess_cfg", "interpolation"), "bilinear", "bilinear"),
    "another resizing": (("preprocess_cfg", "resize_mode"), "squash", "squash"),
}


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_open_clips_of_other_kinds(tmp_path: Path, name: str) -> None:
    """A setting by which the model would be another: the file, the setting and its value."""
    places, value, expected = OF_OPEN_CLIP[name]
    set_in(tmp_path / "a", "open_clip", places, value)
    refused(tmp_path / "a", "open_clip_config.json", expected)


@pytest.mark.parametrize("value", [-10, 0])
def test_a_bias_that_open_clips_settings_promise_is_there(tmp_path: Path, value: float) -> None:
    """``init_logit_bias`` beside weights that have none, where open_clip would put a zero."""
    set_in(tmp_path / "a", "open_clip", ("model_cfg", "init_logit_bias"), value)
    refused(tmp_path / "a", "logit_bias is not there")


OF_HUGGING_FACE = {
    "another kind": (("model_type",), "siglip", "model_type = 'siglip'"),
    "no kind": (("model_type",), None, "model_type = None"),
    "another width within": (("vision_config", "intermediate_size"), 48, "intermediate_size = 48"),
    "another epsilon": (("text_config", "layer_norm_eps"), 1e-6, "layer_norm_eps = 1e-06"),
    "another activation in one tower": (("text_config", "hidden_act"), "gelu", "hidden_act = 'gelu'"),
    "another number of channels": (("vision_config", "num_channels"), 4, "num_channels = 4"),
}


@pytest.mark.parametrize("name", OF_HUGGING_FACE)
def test_huggingfaces_of_other_kinds(tmp_path: Path, name: str) -> None:
    """Another model, or one of settings that CLIP's own towers do not have: the folder and what was found."""
    places, value, expected = OF_HUGGING_FACE[name]
    set_in(tmp_path / "a", "huggingface", places, value)
    refused(tmp_path / "a", "config.json", expected)


def test_huggingfaces_weights_alone(tmp_path: Path) -> None:
    """Without config.json, as a file or as a folder: says what is missing."""
    write_model(tiny_clip(), tmp_path / "a", "huggingface")
    (tmp_path / "a" / "config.json").unlink()
    for source in (tmp_path / "a", tmp_path / "a" / "model.safetensors"):
        refused(source, "without config.json", "save_pretrained")


def set_in(path: Path, kind: str, places: tuple[str, ...], value: Any) -> None:
    """Write a model, and set one place of its configuration."""
    write_model(tiny_clip(), path, kind)
    set_value(path / FILES[kind], places, value)


def set_value(file: Path, places: tuple[str, ...], value: Any) -> None:
    values = json.loads(file.read_text())
    inner = values
    for place in places[:-1]:
        inner = inner[place]
    inner[places[-1]] = value
    file.write_text(json.dumps(values))


FILES = {"open_clip": "open_clip_config.json", "huggingface": "config.json"}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2, 16]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places_of(values: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every place of a configuration, the ones that hold others too."""
    if not isinstance(values, dict):
        return [before]
    return ([before] if before else []) + [place for key in values for place in places_of(values[key], (*before, key))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, changed and set right again."""
    folder = tmp_path_factory.mktemp("folders")
    for kind in FILES:
        write_model(tiny_clip(), folder / kind, kind)
    return folder


@pytest.mark.parametrize("file", ["open_clip/open_clip_config.json", "huggingface/config.json",
                                  "huggingface/preprocessor_config.json"])  # fmt: skip
@settings(max_examples=200, deadline=None, report_multiple_bugs=True)
@given(data=st.data())
def test_anything_in_a_configuration(folders: Path, file: str, data: st.DataObject) -> None:
    """One value of a sound configuration replaced by anything: told what it is, or refused; no other error."""
    path = folders / file
    sound = path.read_text()
    try:
        set_value(path, data.draw(st.sampled_from(places_of(json.loads(sound)))), data.draw(ANYTHING))
        look(path.parent)
    except UserError as error:
        assert str(path.parent) in str(error)
    finally:
        path.write_text(sound)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "", "tanh"])
def test_an_activation_that_is_none_of_clips(tmp_path: Path, activation: str) -> None:
    """In both towers, which agree: named, and refused."""
    set_in(tmp_path / "a", "huggingface", ("vision_config", "hidden_act"), activation)
    set_value(tmp_path / "a" / "config.json", ("text_config", "hidden_act"), activation)
    refused(tmp_path / "a", f"Unknown activation {activation!r}; known: ")


COLOURS = [[0.5], [0.5, 0.5], [0.5] * 4, [float("nan")] * 3, [float("inf")] * 3]


@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("kind", ["open_clip", "huggingface"])
def test_colours_that_are_none(tmp_path: Path, kind: str, name: str, colours: Any) -> None:
    """Not three numbers, or such that no picture could be told by them: refused, and the folder named."""
    if kind == "open_clip":
        set_in(tmp_path / "a", kind, ("preprocess_cfg", name), colours)
    else:
        set_in(tmp_path / "a", kind, ("model_type",), "clip")
        set_value(tmp_path / "a" / "preprocessor_config.json", (f"image_{name}",), colours)
    refused(tmp_path / "a")
