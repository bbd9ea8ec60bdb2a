"""A CLIP under the names of each format, and whether what is loaded embeds as it does."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

import train_clip
from tests.checkpoints.by_hand import tiny_clip
from tests.checkpoints.test_inspect_without_torch import AsOpenAI
from tests.conftest import TINY
from train_clip.checkpoints.huggingface import rename_back
from train_clip.commands.convert import write_model
from train_clip.commands.inspect import inspect
from train_clip.encoders.sources import load_image_encoder, load_text_encoder
from train_clip.models.clip import DualEncoder

# Heads of 64 channels and QuickGELU, as OpenAI's files are read.
SIZES = {
    "activation": "quick_gelu",
    "image": TINY["image"] | {"width": 64, "heads": 1},
    "text": TINY["text"] | {"width": 64, "heads": 1, "vocab": 99},
}


class Original(NamedTuple):
    """A model under the names of a format."""

    module: nn.Module  # whose state dict is saved
    model: DualEncoder  # which embeds alike
    beside: dict[str, Any]  # what its checkpoint holds beside the state dict
    configs: Path | None = None  # a folder of the JSON files that belong beside the weights


def of_openai(folder: Path) -> Original:
    model = tiny_clip(**SIZES)
    return Original(AsOpenAI(copy.deepcopy(model)), model, {})


def of_open_clip(folder: Path) -> Original:
    model = tiny_clip(**SIZES)
    write_model(model, folder / "configs", "open_clip")
    return Original(copy.deepcopy(model), model, {}, folder / "configs")


def of_huggingface(folder: Path) -> Original:
    model = tiny_clip(**SIZES)
    write_model(model, folder / "configs", "huggingface")
    theirs = CLIPModel(CLIPConfig.from_pretrained(folder / "configs"))
    theirs.load_state_dict(rename_back(model.state_dict()))
    return Original(theirs, model, {}, folder / "configs")


def of_module(module: Any) -> Original:
    beside = {"hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2.6.6", "epoch": 1}
    return Original(module, copy.deepcopy(module.model).eval(), beside)


def of_ours(folder: Path) -> Original:
    module = train_clip.CLIPWrapper(config=TINY | SIZES, ema=0.9)
    module.model.load_state_dict(tiny_clip(**SIZES).state_dict())
    return of_module(module)


def of_two_encoders(folder: Path) -> Original:
    write_model(tiny_clip(**SIZES), folder / "one.safetensors", "safetensors")
    towers = (load(f"train-clip:{folder / 'one.safetensors'}") for load in (load_image_encoder, load_text_encoder))
    original = of_module(train_clip.CustomCLIPWrapper(*towers))
    original.beside["hyper_parameters"]["tokenizer"] = {"source": "clip", "context_length": 16}
    return original


ORIGINALS = {
    "OpenAI": of_openai,
    "open_clip": of_open_clip,
    "Hugging Face": of_huggingface,
    "ours": of_ours,
    "two encoders": of_two_encoders,
}


@torch.no_grad()
def check(path: Path, original: Original, warning: str | None = None) -> dict[str, str]:
    """Load, and embed as the original does; ``inspect`` says the same as ``load`` warns of."""
    for config in original.configs.glob("*.json") if original.configs else ():
        (path.parent / config.name).write_bytes(config.read_bytes())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = train_clip.load(path).model
    images = torch.randn(2, 3, original.model.image_size, original.model.image_size)
    texts = torch.tensor([[97, 5, 98] + [0] * 13, [97, 7, 9, 98] + [0] * 12])
    assert torch.equal(model.encode_image(images), original.model.encode_image(images))
    assert torch.equal(model.encode_text(texts), original.model.encode_text(texts))
    assert torch.equal(model.logit_scale, original.model.logit_scale)
    told = [str(one.message) for one in caught if "is taken from" in str(one.message)]
    report = inspect(str(path))
    assert [warning in one for one in told] == ([] if warning is None else [True])
    assert report.get("taken from", "None") in (told or ["None"])[0]
    return report
