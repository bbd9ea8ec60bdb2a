"""The fingerprint of a model, by which embeddings, heads and calibrations know it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.adapters.tiny_families import save
from train_clip import cli, load
from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.own import write_safetensors
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig


def test_the_fingerprint_is_the_models_and_not_the_files(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Equal for the same model in three formats and at another temperature; another where anything embeds otherwise."""
    torch.manual_seed(0)
    model = CLIP(tiny_config)
    file = tmp_path / "a.safetensors"
    write_safetensors(tiny_config, model.state_dict(), file)
    first = fingerprint(load(file).model)
    for kind in ("huggingface", "open_clip"):
        cli.main(["convert", str(file), str(tmp_path / kind), "--to", kind])
        assert fingerprint(load(tmp_path / kind).model) == first
    with torch.no_grad():
        model.logit_scale += 1
        assert fingerprint(model) == first
        model.text_projection[3, 4] += 1e-6
        assert fingerprint(model) != first
    for change in ({"image_size": 32}, {"context_length": 8}):
        assert fingerprint(load(file, **change).model) != first
    for change in (
        {"activation": "quick_gelu" if tiny_config.activation == "gelu" else "gelu"},
        {"mean": (0.1, 0.2, 0.3)},
    ):
        other = CLIP(replace(tiny_config, **change))
        other.load_state_dict(load(file).model.state_dict())
        assert fingerprint(other) != first


def test_the_fingerprint_is_the_same_whatever_a_library_calls_its_layers(tmp_path: Path) -> None:
    """AltCLIP's, which versions of transformers call otherwise: the tensors renamed as each of them has it."""
    save("altclip", tmp_path)
    model = load(tmp_path).model
    first, tensors = fingerprint(model), model.state_dict()
    for one, other in ((".layer.", ".layers."), (".layers.", ".layer.")):
        renamed = {name.replace(one, other): tensor for name, tensor in tensors.items()}
        model.state_dict = lambda renamed=renamed: renamed
        assert fingerprint(model) == first
