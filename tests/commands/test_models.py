"""``train-clip models``."""

from __future__ import annotations

import torch
import yaml

from train_clip.commands.models import models
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict, presets, read_config


def test_every_model_is_listed_with_its_parameters(capsys):
    """Names and the paper's parameter counts, one line each."""
    models()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert list(rows) == [config.name for config in presets()]
    # METHODS' table, which counts OpenAI's released weights.
    assert rows["RN50"] == "102,007,137"
    assert rows["ViT-L/14-336px"] == "427,944,193"


def test_what_is_shown_is_a_model_file(capsys):
    """``--show`` prints YAML that reads back to the preset."""
    models(show="RN50x4")
    assert config_from_dict(yaml.safe_load(capsys.readouterr().out)) == read_config("RN50x4")


def test_what_an_optimizer_updates(capsys):
    """``--optimizer muon``: every parameter of a preset in one row or another, by its optimizer and decay."""
    models(optimizer="muon", model_name="RN50")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = {line[0]: line[1:] for line in lines}
    with torch.device("meta"):
        names = [name for name, _ in CLIP(read_config("RN50")).named_parameters()]
    assert sum(int(line[1]) for line in lines) == len(names)
    assert rows["transformer.resblocks.*.attn.in_proj_weight"] == "12 1536×512 Muon, as 3 matrices 0.2".split()
    assert rows["visual.attnpool.q_proj.weight"] == "1 2048×2048 Muon 0.2".split()
    for name in ("visual.attnpool.c_proj.weight", "visual.conv1.weight", "token_embedding.weight", "text_projection"):
        assert rows[name][2:] == ["AdamW", "0.2"]
    assert rows["logit_scale"] == "1 1 AdamW 0".split()
    models(optimizer="sgd")
    assert {line.split()[3] for line in capsys.readouterr().out.splitlines()[1:]} == {"SGD"}
