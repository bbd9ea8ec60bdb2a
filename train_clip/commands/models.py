"""List the presets, and how an optimizer treats a model's parameters."""

import re
from collections import Counter

import torch
import yaml

from train_clip.commands import evaluate, run, train
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, presets, read_config
from train_clip.training import clip_wrapper, muon
from train_clip.training.optimizer import build_optimizer

OF_PRESETS = "model,parameters,image,text,pixels,embed,image tower,text tower,lr,betas,eps,decay,warm-up,epochs".split(
    ","
)
NAMES = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}  # of others, the option's own


def models(show: str | None = None, optimizer: str | None = None, model_name: str = train.DEFAULT_MODEL) -> None:
    """List the models, their parameters, sizes and hyperparameters; or how an optimizer treats each parameter.

    Args:
        show: print this preset as a YAML file, to start one of your own from
        optimizer: list the parameters of a model, and which optimizer updates each with this choice
        model_name: the model: a preset or a YAML file of your own
    """
    if optimizer is not None:
        evaluate.print_table(_updates(read_config(model_name), optimizer))
    elif show is not None:
        print(yaml.safe_dump(read_config(show).to_dict(), sort_keys=False, default_flow_style=None), end="")
    else:
        evaluate.print_table([OF_PRESETS, *map(_row, presets())])


def _updates(config: ModelConfig, optimizer: str) -> list[list[str]]:
    """A row for each parameter, those of a tower's blocks together."""
    with torch.device("meta"):
        module = clip_wrapper.CLIPWrapper(config.name, config, optimizer=optimizer)
    groups = build_optimizer(module.model, module.model, module.options).param_groups
    of_group = {parameter: group for group in groups for parameter in group["params"]}
    rows: Counter[tuple[str, ...]] = Counter()
    for name, parameter in module.model.named_parameters():
        group = of_group[parameter]
        of_muon = group.get(muon.HIDDEN, False)
        key = "adamw" if optimizer == "muon" and not of_muon else optimizer
        by = NAMES.get(key, key)
        if of_muon and (together := muon.row_blocks(parameter)) > 1:
            by += f", as {together} matrices"
        shape = "×".join(map(str, parameter.shape)) or "1"
        rows[re.sub(r"\.\d+\.", ".*.", name), shape, by, f"{group['weight_decay']:g}"] += 1
    heading = ["parameters", "tensors", "shape", "optimizer", "decay"]
    return [heading, *([name, str(tensors), *others] for (name, *others), tensors in rows.items())]


def _row(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        model = CLIP(config)
    total, in_image, text, numbers = run.count(model), run.count(model.visual), config.text, config.optimizer
    return [
        config.name,
        f"{total:,}",
        f"{in_image:,}",
        f"{total - in_image - 1:,}",  # the temperature is neither's
        str(config.image.size),
        str(config.embed_dim),
        str(config.image).partition(" of ")[2].replace(" layers of ", "×"),
        f"{text.layers}×{text.width}, {text.heads} heads",
        f"{numbers.lr:g}",
        f"{numbers.betas[0]:g}, {numbers.betas[1]:g}",
        f"{numbers.eps:g}",
        f"{numbers.weight_decay:g}",
        f"{numbers.warmup_steps:,}",
        str(numbers.epochs),
    ]
