"""List the presets."""

from __future__ import annotations

import torch
import yaml
from rich.console import Console
from rich.table import Table

from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, ResNetConfig, presets, read_config

WIDTH = 200  # characters, what the widest row takes


def models(show: str | None = None) -> None:
    """List the models, their parameters, sizes and optimizer numbers.

    Args:
        show: print this preset as a YAML file, to start one of your own from
    """
    if show is not None:
        print(yaml.safe_dump(read_config(show).to_dict(), sort_keys=False, default_flow_style=None), end="")
        return
    table = Table("model", box=None, header_style="bold", pad_edge=False)
    for heading in ("parameters", "image", "text", "pixels", "embed"):
        table.add_column(heading, justify="right")
    for heading in ("image tower", "text tower", "lr", "betas", "eps", "decay", "warm-up", "epochs"):
        table.add_column(heading)
    for config in presets():
        table.add_row(*_row(config))
    # A table that folds its columns to a terminal's width cannot be read or piped.
    Console(width=max(WIDTH, Console().width)).print(table)


def _row(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        model = CLIP(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    in_image = sum(parameter.numel() for parameter in model.visual.parameters())
    text, numbers = config.text, config.optimizer
    return [
        config.name,
        f"{total:,}",
        f"{in_image:,}",
        f"{total - in_image - 1:,}",
        str(config.image.size),
        str(config.embed_dim),
        _image_sizes(config),
        f"{text.layers}×{text.width}, {text.heads} heads",
        f"{numbers.lr:g}",
        f"{numbers.betas[0]:g}, {numbers.betas[1]:g}",
        f"{numbers.eps:g}",
        f"{numbers.weight_decay:g}",
        f"{numbers.warmup_steps:,}",
        str(numbers.epochs),
    ]


def _image_sizes(config: ModelConfig) -> str:
    image = config.image
    if isinstance(image, ResNetConfig):
        return f"blocks {'-'.join(map(str, image.blocks))}, width {image.width}"
    return f"{image.layers}×{image.width}, {image.heads} heads, patch {image.patch}"
