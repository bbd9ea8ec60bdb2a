"""List the presets, and what an optimizer makes of a model's parameters."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
import yaml
from rich.console import Console

from train_clip.commands.evaluate import table
from train_clip.commands.train import DEFAULT_MODEL
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, presets, read_config
from train_clip.options import TrainingOptions
from train_clip.training.muon import HIDDEN, row_blocks
from train_clip.training.optimizer import build_optimizer

WIDTH = 200  # characters, what the widest row takes
NAMES = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}  # of others, the option's own


def models(
    show: str | None = None,
    optimizer: str | None = None,
    model_name: str = DEFAULT_MODEL,
) -> None:
    """List the models, their parameters, sizes and optimizer numbers; or what an optimizer does with each parameter.

    Args:
        show: print this preset as a YAML file, to start one of your own from
        optimizer: list the parameters of a model, and which optimizer updates each when this one is asked for
        model_name: whose, a preset or a YAML file of your own
    """
    if optimizer is not None:
        _print(_updates(read_config(model_name), optimizer))
    elif show is not None:
        print(yaml.safe_dump(read_config(show).to_dict(), sort_keys=False, default_flow_style=None), end="")
    else:
        rows = [_row(config) for config in presets()]
        _print([list(rows[0]), *(list(row.values()) for row in rows)])


def _print(rows: Sequence[Sequence[str]]) -> None:
    # A table that folds its columns to a terminal's width cannot be read or piped.
    Console(width=max(WIDTH, Console().width)).print(table(rows))


def _updates(config: ModelConfig, optimizer: str) -> list[list[str]]:
    """A row for each parameter, those of a tower's blocks together."""
    with torch.device("meta"):
        model = CLIP(config)
    options = TrainingOptions.of({"optimizer": optimizer} | config.optimizer.options())
    groups = build_optimizer(model, model, options).param_groups
    of_group = {parameter: group for group in groups for parameter in group["params"]}
    rows: Counter[tuple[str, ...]] = Counter()
    for name, parameter in model.named_parameters():
        group = of_group[parameter]
        of_muon = group.get(HIDDEN, False)
        key = "adamw" if optimizer == "muon" and not of_muon else optimizer
        by = NAMES.get(key, key)
        if of_muon and (together := row_blocks(parameter)) > 1:
            by += f", as {together} matrices"
        shape = "×".join(map(str, parameter.shape)) or "1"
        rows[re.sub(r"\.\d+\.", ".*.", name), shape, by, f"{group['weight_decay']:g}"] += 1
    heading = ["parameters", "tensors", "shape", "optimizer", "decay"]
    return [heading, *([name, str(tensors), *others] for (name, *others), tensors in rows.items())]


def _row(config: ModelConfig) -> dict[str, str]:
    with torch.device("meta"):
        model = CLIP(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    in_image = sum(parameter.numel() for parameter in model.visual.parameters())
    text, numbers = config.text, config.optimizer
    return {
        **{"model": config.name, "parameters": f"{total:,}"},
        **{"image": f"{in_image:,}", "text": f"{total - in_image - 1:,}"},
        **{"pixels": str(config.image.size), "embed": str(config.embed_dim)},
        "image tower": str(config.image).partition(" of ")[2].replace(" layers of ", "×"),
        "text tower": f"{text.layers}×{text.width}, {text.heads} heads",
        **{"lr": f"{numbers.lr:g}", "betas": f"{numbers.betas[0]:g}, {numbers.betas[1]:g}", "eps": f"{numbers.eps:g}"},
        **{"decay": f"{numbers.weight_decay:g}", "warm-up": f"{numbers.warmup_steps:,}", "epochs": str(numbers.epochs)},
    }
