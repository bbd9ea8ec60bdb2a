"""Sound files that do not fit, or leave something open: what was found, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints.by_hand import tiny_clip
from tests.conftest import TINY
from train_clip import load
from train_clip.commands.convert import write_model
from train_clip.errors import UserError

MARKS = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}


def refused(source: Any, *expected: str, **choices: Any) -> str:
    """The message, in which the source and the words stand."""
    with pytest.raises(UserError) as caught:
        load(source, **choices)
    for word in (str(source), *expected):
        assert word in str(caught.value)
    return str(caught.value)


@pytest.fixture
def described(tmp_path: Path) -> str:
    """The tiny model as a user's YAML file."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A state dict and nothing else."""
    torch.save(tiny_clip().state_dict(), tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


@pytest.fixture(params=["open_clip", "huggingface", "safetensors"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in each format that is written."""
    write_model(tiny_clip(), tmp_path / "model.safetensors", request.param)
    return tmp_path / "model.safetensors"


def change(path: Path, mend: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a file, or of the file in a folder; the metadata stay."""
    from safetensors import safe_open

    file = path if path.is_file() else next(path.glob("*.safetensors"))
    with safe_open(file, framework="pt") as held:
        metadata = held.metadata()
    tensors = load_file(file)
    mend(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata=metadata)


# Weights that do not fit


def test_what_is_written_loads(written: Path) -> None:
    """What is damaged below is right before."""
    state = load(written).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny_clip().state_dict().items())


def test_a_tensor_is_missing(written: Path) -> None:
    """Named under the name that it has here."""
    change(
        written,
        lambda tensors: tensors.pop(next(name for name in tensors if "ln_final" in name or "final_layer" in name)),
    )
    assert "ln_final" in refused(written, "is not there, expected (16,) numbers", "Expected the tensors of the model")


def test_a_tensor_is_foreign(written: Path) -> None:
    """Named; and of many the first, and how many."""
    change(written, lambda tensors: tensors.update(foreign=torch.ones(2)))
    refused(written, "in 1 tensors: foreign is (2,) numbers, expected not there")
    change(written, lambda tensors: tensors.update({f"foreign{number}": torch.ones(2) for number in range(9)}))
    refused(written, "in 10 tensors: foreign is", "foreign0 is", "foreign1 is")


def test_a_tensor_of_another_shape(written: Path) -> None:
    """Both shapes, the found one first."""
    name = next(name for name in ("text_projection", "text_projection.weight"))
    change(written, lambda tensors: tensors.update({name if name in tensors else f"{name}.weight": torch.ones(16, 24)}))
    message = refused(written, "text_projection is (", "expected (16, 16) numbers")
    assert "(16, 24)" in message or "(24, 16)" in message


ODD = {
    "a temperature of two": ("logit_scale", torch.ones(2)),
    "a convolution of two dimensions": ("visual.conv1.weight", torch.ones(16, 192)),
    "a convolution of no dimension": ("visual.conv1.weight", torch.tensor(1.0)),
    "a convolution of nothing": ("visual.conv1.weight", torch.ones(0, 3, 8, 8)),
    "a patch of nothing": ("visual.conv1.weight", torch.ones(16, 3, 0, 0)),
    "no image positions": ("visual.positional_embedding", torch.ones(0, 16)),
    "image positions of no dimension": ("visual.positional_embedding", torch.tensor(1.0)),
    "no text positions": ("positional_embedding", torch.ones(0, 16)),
    "a gain of no dimension": ("ln_final.weight", torch.tensor(1.0)),
    "a gain of nothing": ("ln_final.weight", torch.ones(0)),
    "a projection of one dimension": ("text_projection", torch.ones(16)),
    "an empty vocabulary": ("token_embedding.weight", torch.ones(0, 16)),
    "a gain of whole numbers": ("ln_final.bias", torch.ones(16, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["plain", "OpenAI's", "open_clip"])
def test_odd_shapes(tmp_path: Path, described: str, kind: str, name: str) -> None:
    """One tensor of another form, in files told by their shapes and in one that has a configuration: refused."""
    key, value = ODD[name]
    held = tiny_clip().state_dict() | {key: value}
    path, choices = tmp_path / "a.pt", {"model_name": described, "activation": "gelu"}
    if kind == "open_clip":
        path, choices = tmp_path / "folder", {}
        write_model(tiny_clip(), path, "open_clip")
        change(path, lambda tensors: tensors.update({key: value}))
    elif kind == "OpenAI's":
        torch.save(held | MARKS, path)
        choices = {"model_name": described}
    else:
        torch.save(held, path)
    try:
        state = load(path, **choices).model.state_dict()
    except UserError as error:
        assert str(path) in str(error)
    else:
        # Whole numbers in place of others may be taken for what they are.
        assert value.shape == state[key].shape
        assert torch.equal(state[key], value.float())


def test_huggingfaces_queries_and_keys_that_do_not_fit(tmp_path: Path) -> None:
    """A key matrix of another form, or none at all: the message names the folder."""
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    for value in (torch.ones(16, 8), torch.ones(8, 16), torch.tensor(1.0), None):
        path = tmp_path / str(value is None) / str(None if value is None else tuple(value.shape))
        write_model(tiny_clip(), path, "huggingface")
        change(path, lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value}))  # noqa: B023
        refused(path)


# What a file leaves open


def test_heads_are_not_said(plain: Path, described: str) -> None:
    """Says how to describe them; so described, it loads, its activation being chosen too."""
    refused(plain, "heads", "YAML", "--model_name", "model_name=", "train-clip models --show")
    model = load(plain, model_name=described, activation="gelu").model
    assert model.config.activation == "gelu"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tiny_clip().state_dict().items())


def test_activation_is_not_said(plain: Path, described: str) -> None:
    """Says that no tensor tells, and how to choose, in the command and in Python."""
    refused(plain, "--activation quick_gelu", "--activation gelu", "activation=", model_name=described)


@pytest.mark.parametrize("chosen", ["relu", "", "QuickGELU"])
def test_an_activation_that_there_is_not(plain: Path, described: str, chosen: str) -> None:
    """Names it, and those that there are."""
    with pytest.raises(UserError, match=f"activation is {chosen!r}; expected one of gelu, quick_gelu"):
        load(plain, model_name=described, activation=chosen)


def test_activation_contradicts(written: Path) -> None:
    """Names both. What agrees is let through."""
    refused(written, "its activation is quick_gelu", "gelu requested", "Leave", activation="gelu")
    assert load(written, activation="quick_gelu").model.config.activation == "quick_gelu"


def test_model_name_of_another_size(plain: Path, written: Path) -> None:
    """A preset's name for a tiny file: what does not fit, or, of a file that says its sizes, that they are others."""
    refused(plain, "does not match its model", "(--model_name)", model_name="ViT-B/32", activation="gelu")
    refused(written, "--model_name ViT-B/32 has other sizes", "Leave out --model_name", model_name="ViT-B/32")


def test_model_name_that_is_none(plain: Path, tmp_path: Path) -> None:
    """An unknown preset, a file that is not there, one that is no model."""
    (tmp_path / "b.yaml").write_text("[1]")
    for name, expected in (
        ("ViT-Z/1", "Presets"),
        (str(tmp_path / "a.yaml"), "No such file"),
        (str(tmp_path / "b.yaml"), "list"),
    ):
        with pytest.raises(UserError, match=expected):
            load(plain, model_name=name, activation="gelu")


def test_heads_contradict(written: Path, tmp_path: Path) -> None:
    """A model of the same sizes and other heads, where the file says its heads: refused, or the file's stay.

    The tensors fit either way, and the embeddings would be others.
    """
    other = TINY | {"text": TINY["text"] | {"heads": 4}, "image": TINY["image"] | {"heads": 8}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    own = load(written).model.config
    try:
        config = load(written, model_name=str(tmp_path / "other.yaml")).model.config
    except UserError as error:
        assert str(written) in str(error)
    else:
        assert (config.image.heads, config.text.heads) == (own.image.heads, own.text.heads)


def test_colours_of_the_users_description(plain: Path, tmp_path: Path) -> None:
    """A state dict says no mean and no deviation: those of the user's own file are taken."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(TINY | {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.1, 0.3]}))
    config = load(plain, model_name=str(tmp_path / "own.yaml"), activation="gelu").model.config
    assert (config.mean, config.std) == ((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))


def test_weights_of_another_kind(tmp_path: Path) -> None:
    """Names some of the tensors, and the verb that joins other encoders."""
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "weight, bias", "not those of a CLIP", "train-clip finetune")


# Checkpoints of Lightning


@pytest.mark.parametrize(
    "arguments",
    [
        {"config": "configs/ViT.yaml"}, {"config": None}, {"config": 3}, {"config": [1]}, {"config": {}},
        {"config": TINY | {"name": 3}}, {"config": TINY | {"image": []}}, {"config": {3: 4}}, {"config": TINY | {4: 5}},
        {"text_encoder": "bert-base-uncased"}, {"text_encoder": None}, {"text_encoder": {"source": 3}},
        {"text_encoder": {}, "image_encoder": {}, "tokenizer": {}},
        {"text_encoder": {"source": "hf"}, "image_encoder": {"source": "no", "name": "x"}, "tokenizer": {"a": 1}},
    ],
)  # fmt: skip
def test_somebody_elses_hyperparameters(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Other people's modules have arguments of these names too: refused, whatever they hold."""
    state = {f"model.{name}": value for name, value in tiny_clip().state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": arguments, "epoch": 1}, tmp_path / "a.ckpt")
    with pytest.raises(UserError):
        load(tmp_path / "a.ckpt")
