"""``train-clip models``."""

from __future__ import annotations

import yaml

from train_clip.commands.models import models
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
