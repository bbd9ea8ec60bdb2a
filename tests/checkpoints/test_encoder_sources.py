"""Encoders by the prefix of their source; timm and torchvision as small stand-ins with their functions' forms."""

from __future__ import annotations

import io
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from train_clip.encoders.encoder import image_features
from train_clip.encoders.libraries import HEADS
from train_clip.encoders.sources import (
    SOURCES,
    build_encoder,
    load_image_encoder,
    load_text_encoder,
)
from train_clip.errors import UserError

SIDE, WIDTH, CLASSES = 8, 6, 10
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


class Network(nn.Module):
    """A convolution, its mean over space, and a head of the given name and form."""

    def __init__(self, head: str, form: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.name = head
        setattr(self, head, form)

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self, self.name)(self.conv(images).mean(dim=(2, 3)))


FORMS = {
    "linear": lambda: nn.Linear(WIDTH, CLASSES),
    "sequence": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(WIDTH, CLASSES)),
    "no linear": lambda: nn.Identity(),
}


def kept(description: dict[str, Any]) -> dict[str, Any]:
    """A description after it lay in a file that is read without executing code."""
    file = io.BytesIO()
    torch.save(description, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def torchvision(monkeypatch) -> SimpleNamespace:
    """torchvision.models with one network, whose head a test may choose; ``state`` is its pretrained weights."""
    stand_in = SimpleNamespace(head="fc", form="linear", reachable=True, state=None)
    trained_on = SimpleNamespace(crop_size=[SIDE], mean=[*MEAN], std=[*STD])
    weights = SimpleNamespace(url="https://there/net.pth", transforms=lambda: trained_on)

    def get_model(name: str, weights: Any = None) -> nn.Module:
        module = Network(stand_in.head, FORMS[stand_in.form]())
        if weights is not None and not stand_in.reachable:
            raise OSError("<urlopen error: nothing there>")
        if weights is not None:
            stand_in.state = module.state_dict()
        return module

    models = ModuleType("torchvision.models")
    models.get_model = get_model
    models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=weights)
    models.list_models = lambda module=None: ["net", "another"] if module is models else ["net", "another", "boxes"]
    package = ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return stand_in


@pytest.fixture
def timm(monkeypatch) -> ModuleType:
    """Timm with one network, "net"; ``input_size`` is what it was trained on, ``failure`` what loading raises."""
    package = ModuleType("timm")
    package.__version__ = "1.0"
    package.input_size, package.failure = (3, SIDE, SIDE), None

    def create_model(
        name: str, pretrained: bool = False, pretrained_cfg: Any = None, num_classes: int = 5, **arguments: Any
    ) -> nn.Module:
        assert num_classes == 0 and bool(pretrained) != bool(pretrained_cfg)
        if pretrained and package.failure:
            raise package.failure
        module = Network("head", nn.Identity())
        module.register_forward_pre_hook(require_its_size)
        module.pretrained_cfg = pretrained_cfg or {"architecture": "net", "mean": MEAN, "what": object()}
        module._model_args = {"num_classes": 0, "depth": 2, **arguments}
        return module

    def require_its_size(_: nn.Module, images: tuple[Tensor]) -> None:
        if images[0].shape[1:] != package.input_size:
            raise ValueError(f"takes {package.input_size}")

    package.create_model = create_model
    package.is_model = lambda name: name == "net"
    package.list_models = lambda: ["net"]
    package.data = SimpleNamespace(
        resolve_model_data_config=lambda module: {"input_size": package.input_size, "mean": MEAN, "std": STD}
    )
    monkeypatch.setitem(sys.modules, "timm", package)
    return package


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ["linear", "sequence"])
@torch.no_grad()
def test_torchvision(torchvision, head, form):
    """The features are what the last layer takes, by hand from the weights; rebuilt strictly, they are equal."""
    torchvision.head, torchvision.form = head, form
    encoder = load_image_encoder("torchvision:net")
    images = torch.randn(2, 3, SIDE, SIDE)
    features = image_features(encoder.module.eval()(images))
    expected = nn.functional.conv2d(images, torchvision.state["conv.weight"], torchvision.state["conv.bias"])
    expected = expected.mean(dim=(2, 3))
    if form == "sequence":
        first = (torchvision.state[f"{head}.0.{name}"] for name in ("weight", "bias"))
        expected = nn.functional.linear(expected, *first).relu()
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert (encoder.width, encoder.size, encoder.mean, encoder.std) == (WIDTH, SIDE, MEAN, STD)
    assert not any(CLASSES in parameter.shape for parameter in encoder.module.parameters())
    again = build_encoder(kept(encoder.description), "image")
    again.module.load_state_dict(encoder.module.state_dict(), strict=True)
    assert torch.equal(again.module(images), features)
    assert (again.width, again.size, again.mean, again.std) == (WIDTH, SIDE, MEAN, STD)


def test_torchvision_names(torchvision):
    """Image classifiers alone, the nearest first."""
    for name, nearest in (("nett", "net, another"), ("boxes", "another, net")):
        with pytest.raises(UserError, match=rf"torchvision:{name}: .*no such image encoder.* such as {nearest}\."):
            load_image_encoder(f"torchvision:{name}")


def test_torchvision_without_network(torchvision):
    torchvision.reachable = False
    with pytest.raises(UserError, match=r"cannot be downloaded.*Copy https://there/net.pth into .*/checkpoints\.$"):
        load_image_encoder("torchvision:net")


def test_torchvision_without_a_last_layer(torchvision, monkeypatch):
    """No linear layer at the end, no head of a known name, or two classifiers."""
    torchvision.form = "no linear"
    with pytest.raises(UserError, match=r"found no nn.Linear at the end, under fc, classifier, head, heads"):
        load_image_encoder("torchvision:net")
    torchvision.head, torchvision.form = "other", "linear"
    with pytest.raises(UserError, match=r"found no nn.Linear at the end"):
        load_image_encoder("torchvision:net")
    torchvision.head = "fc"
    monkeypatch.setattr(Network, "aux_logits", True, raising=False)
    with pytest.raises(UserError, match="a second classifier half-way"):
        load_image_encoder("torchvision:net")


@torch.no_grad()
def test_timm(timm):
    """The description holds the architecture and its arguments as plain data, so that a tag's meaning may change."""
    encoder = load_image_encoder("timm:net.tag")
    images = torch.randn(2, 3, SIDE, SIDE)
    description = kept(encoder.description)
    assert description["name"] == "net.tag" and description["architecture"] == "net"
    assert description["arguments"] == {"num_classes": 0, "depth": 2}
    json.dumps(description)
    again = build_encoder(description, "image")
    again.module.load_state_dict(encoder.module.state_dict(), strict=True)
    assert torch.equal(again.module(images), encoder.module(images))
    assert (again.width, again.size, again.mean, again.std) == (WIDTH, SIDE, MEAN, STD)
    assert (encoder.width, encoder.size, encoder.mean, encoder.std) == (WIDTH, SIDE, MEAN, STD)


def test_timm_failures(timm):
    """An unknown name, no network, a folder that cannot be read, an encoder of other images."""
    with pytest.raises(UserError, match=r"timm:nett: .*no such image encoder.* its list_models\(\), such as net\."):
        load_image_encoder("timm:nett")
    with pytest.raises(UserError, match=r"timm:zzzzzzzz: .* its list_models\(\), such as net\."):
        load_image_encoder("timm:zzzzzzzz")
    timm.failure = RuntimeError("no connection.\nat all")
    with pytest.raises(
        UserError, match=r"cannot be downloaded \(no connection\).*--image_encoder timm:local-dir:FOLDER"
    ):
        load_image_encoder("timm:net")
    with pytest.raises(UserError, match=r"timm:local-dir:there: its weights are damaged, .*\(no connection\)"):
        load_image_encoder("timm:local-dir:there")
    timm.failure = None
    for size in ((1, 8, 8), (3, 8, 6)):
        timm.input_size = size
        with pytest.raises(UserError, match=r"timm:net: Network fails on an image of 8 × 8 .*ValueError: takes \("):
            load_image_encoder("timm:net")


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_library_that_is_missing(name, monkeypatch):
    """One line that says what to install, for loading and for rebuilding."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.models", None)
    description = {"source": name, "name": "resnet50", "architecture": "resnet50", "config": {}, "arguments": {}}
    for run in (lambda: load_image_encoder(f"{name}:resnet50"), lambda: build_encoder(description, "image")):
        with pytest.raises(UserError, match=rf"^This encoder or model needs {name}, .*pip install {name}\.$"):
            run()


def test_hugging_face_by_prefix(tmp_path):
    """A folder with both towers, as an image and as a text encoder, and both from their descriptions."""
    blocks = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**blocks, "image_size": SIDE, "patch_size": 4}
    config = transformers.CLIPConfig(text_config={**blocks, "vocab_size": 50}, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    values = {"size": SIDE, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    image, text = load_image_encoder(f"hf:{tmp_path}"), load_text_encoder(f"hf:{tmp_path}")
    assert (image.size, image.width, text.width, text.context, text.vocab) == (SIDE, 16, 16, 77, 50)
    build_encoder(kept(image.description), "image").module.load_state_dict(image.module.state_dict(), strict=True)
    build_encoder(kept(text.description), "text").module.load_state_dict(text.module.state_dict(), strict=True)


@pytest.mark.parametrize("source", ["resnet50", "openai:clip", ":", "hf:", "", "hf", "HF:model"])
@pytest.mark.parametrize(("load", "kind"), [(load_image_encoder, "image"), (load_text_encoder, "text")])
def test_a_source_that_is_unknown(load, kind, source, tmp_path, monkeypatch):
    """The message gives an example of each source that has such encoders."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as failure:
        load(source)
    message = str(failure.value)
    assert message.startswith(f"--{kind}_encoder {source}: ")
    for prefix in SOURCES:
        assert (f" {prefix}:" in message) == (kind == "image" or prefix not in ("timm", "torchvision"))


def test_a_path_without_prefix(tmp_path):
    with pytest.raises(UserError, match=rf"a path without its library. Write hf:{tmp_path}\.$"):
        load_image_encoder(str(tmp_path))
    file = tmp_path / "last.ckpt"
    file.touch()
    with pytest.raises(UserError, match=rf"a path without its library. Write train-clip:{file}\.$"):
        load_text_encoder(str(file))


@pytest.mark.parametrize("source", ["timm:resnet50", "torchvision:resnet50"])
def test_a_library_without_text_encoders(source):
    with pytest.raises(UserError, match=rf"{source}: \w+ has no text encoders. Expected .*hf:sentence-transformers"):
        load_text_encoder(source)
    with pytest.raises(UserError, match="A text encoder of source 'timm'; expected"):
        build_encoder({"source": "timm"}, "text")


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("description", [{}, {"source": "tomorrow"}])
def test_a_description_of_no_known_source(kind, description):
    with pytest.raises(UserError, match=r"known: hf, timm, .*torchvision"):
        build_encoder(description, kind)
