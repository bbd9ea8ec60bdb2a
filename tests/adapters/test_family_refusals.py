"""Bad files of the families: one line each, which says what was found and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_clip
from tests.adapters.tiny_families import BERT, XLM_ROBERTA, save, tokenizer
from tests.checkpoints.test_configurations import ANYTHING, places_of, set_value
from train_clip import cli
from train_clip.errors import UserError


def change(folder: Path, file: str, **values: Any) -> None:
    """Set values in a JSON file, or take out those that are None."""
    path = folder / file
    held = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))


PIXELS = "preprocessor_config.json"
CASES = {
    "another family's processor": (
        lambda folder: change(folder, PIXELS, image_processor_type="CLIPImageProcessor"),
        r"its image processor is CLIPImageProcessor, of another family; expected SiglipImageProcessor",
    ),
    "no processor": (lambda folder: (folder / PIXELS).unlink(), r"no preprocessor_config.json next to the weights"),
    "another size": (
        lambda folder: change(folder, PIXELS, size={"height": 64, "width": 64}),
        r"images of 64×64 pixels; expected the model's 32×32",
    ),
    "no square": (lambda folder: change(folder, PIXELS, size={"height": 32, "width": 48}), r"expected a square"),
    "a shorter side alone": (lambda folder: change(folder, PIXELS, size={"shortest_edge": 32}), r"expected a square"),
    "a size that is none": (
        lambda folder: change(folder, PIXELS, size={"height": "a", "width": "a"}),
        r"expected a square",
    ),
    "another filter": (lambda folder: change(folder, PIXELS, resample=1), r"resample 1; expected 2 \(bilinear\) or 3"),
    "colours that are none": (lambda folder: change(folder, PIXELS, image_mean=[0.5]), r"expected three numbers each"),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        r"the tokenizer cannot be loaded",
    ),
    "a custom class": (
        lambda folder: change(folder, "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"}),
        r"auto_map\), whose code comes with the weights and is never run",
    ),
    "a class of that type": (
        lambda folder: change(folder, "config.json", architectures=["SiglipForImageClassification"]),
        r"architectures \['SiglipForImageClassification'\]; expected SiglipModel",
    ),
    "sizes of another model": (
        lambda folder: change(
            folder, "config.json", vision_config={"hidden_size": 24, "num_attention_heads": 2, "image_size": 32}
        ),
        r"does not match its model in \d+ tensors",
    ),
    "a configuration of nothing": (
        lambda folder: change(folder, "config.json", vision_config={"hidden_size": "wide"}),
        r"its config.json describes no SiglipModel",
    ),
    **{
        f"refused: {kind}": (
            lambda folder, kind=kind: change(folder, "config.json", model_type=kind),
            rf"model_type = '{kind}'",
        )
        for kind in ("siglip2", "blip", "blip-2", "clipseg", "flava", "groupvit", "owlvit", "owlv2", "tipsv2", "own")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, tmp_path):
    """The folder's name or its path is in the line."""
    spoil, expected = CASES[name]
    save("siglip", tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(UserError, match=expected) as error:
        train_clip.load(tmp_path / "m")
    assert "m" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_code_beside_weights_is_not_run(tmp_path):
    """A folder whose code would write a file."""
    save("siglip", tmp_path / "m")
    (tmp_path / "m" / "modeling_own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    for file in ("config.json", "tokenizer_config.json", PIXELS):
        change(
            tmp_path / "m", file, auto_map={"AutoModel": "modeling_own.A", "AutoTokenizer": ["modeling_own.A", None]}
        )
    with pytest.raises(UserError):
        train_clip.load(tmp_path / "m")
    change(tmp_path / "m", "config.json", auto_map=None)
    try:
        train_clip.load(tmp_path / "m")
    except UserError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(tmp_path):
    """More tokens than the model knows, and padding on a side from which the family is read."""
    save("chinese_clip", tmp_path)
    large = tokenizer(BERT)
    large.add_tokens([f"more{place}" for place in range(9)])
    large.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens; the model knows \d+"):
        train_clip.load(tmp_path)
    tokenizer(XLM_ROBERTA, padding_side="left").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pads on the left"):
        train_clip.load(tmp_path)


@pytest.mark.parametrize("sizes", [{"hidden_size": 2**20, "intermediate_size": 2**20}, {"vocab_size": 2**40}])
def test_sizes_that_the_weights_do_not_have(sizes, tmp_path, monkeypatch):
    """Refused in one line before any parameter of these sizes gets memory."""
    save("siglip", tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())["text_config"]
    change(tmp_path, "config.json", text_config=held | sizes)
    made, register = [], torch.nn.Module.register_parameter

    def recorded(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        made.append(0 if parameter is None or parameter.is_meta else parameter.numel())
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", recorded)
    with pytest.raises(UserError, match=r"does not match its model in \d+ tensors"):
        train_clip.load(tmp_path)
    assert made and max(made) <= 1


@pytest.mark.parametrize("words", [["--image_size", "64"], ["--context_length", "8"], ["--model_name", "ViT-B/32"]])
def test_options_of_a_clip(words, tmp_path, monkeypatch):
    """Sizes that are fixed."""
    monkeypatch.chdir(tmp_path)
    save("siglip", tmp_path / "m")
    with pytest.raises(SystemExit, match="whose sizes and activations are fixed"):
        cli.main(["evaluate", "m", "--folder", ".", *words])


def test_gradient_checkpointing_of_align(tmp_path):
    """Which transformers has not for its image tower."""
    from tests.adapters.test_training import begun

    save("align", tmp_path)
    with pytest.raises(UserError, match="none for the image tower"):
        begun(tmp_path, gradient_checkpointing=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose files are changed and set right again."""
    place = tmp_path_factory.mktemp("fuzzed") / "m"
    save("siglip", place)
    return place


@pytest.mark.parametrize("file", ["config.json", PIXELS])
@settings(max_examples=60, deadline=None, report_multiple_bugs=True)
@given(data=st.data())
def test_anything_in_a_configuration(folder: Path, file: str, data: st.DataObject) -> None:
    """One value of a sound configuration replaced by anything: built of it, or refused; no other error."""
    path = folder / file
    sound = path.read_text()
    try:
        set_value(path, data.draw(st.sampled_from(places_of(json.loads(sound)))), data.draw(ANYTHING))
        train_clip.load(folder)
    except UserError as error:
        assert "m" in str(error)
    finally:
        path.write_text(sound)


def test_more_layers_than_tensors(tmp_path):
    """Refused before so many are built."""
    save("siglip", tmp_path)
    change(tmp_path, "config.json", text_config={"num_hidden_layers": 10**9})
    with pytest.raises(UserError, match=r"1,000,000,000 layers, and \d+ tensors"):
        train_clip.load(tmp_path)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"family": "other"}, "of the family 'other'; known are siglip"),
        ({"family": []}, "is not as this package writes it"),
        ({"config": None}, "is not as this package writes it"),
        ({"processor": [1]}, "is not as this package writes it"),
        ({"config": {"text_config": [1]}}, "its text_config is a list"),
        ({"processor": {"size": [7]}}, "expected a square"),
        (
            {"processor": {"size": {"height": 32, "width": 32}, "rescale_factor": "x"}},
            "preprocessor_config.json is damaged",
        ),
        (None, "tokenizer"),
    ],
)
def test_a_checkpoint_that_was_changed(told, expected, tmp_path):
    """What it tells of its model, and of its tokenizer."""
    from tests.adapters.test_training import SGD, begun, step

    save("siglip", tmp_path / "m")
    module = begun(tmp_path / "m", **SGD)
    step(module)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    if told is None:
        held["hyper_parameters"]["tokenizer"] = {"source": "files", "a": "=", "../b": "YQ=="}
    else:
        held["hyper_parameters"]["adapter"] |= told
    torch.save(held, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=expected):
        train_clip.load(tmp_path / "a.ckpt")
    assert not (tmp_path.parent / "b").exists()
