"""What this package writes, and what train-CLIP wrote before it: Lightning's checkpoints, ``.safetensors`` files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from train_clip.checkpoints.found import Found, without_prefix
from train_clip.checkpoints.openai import config_from_shapes
from train_clip.checkpoints.read import Contents
from train_clip.errors import UserError
from train_clip.models.config import config_from_dict

METADATA = "train_clip"  # under it a .safetensors file holds the model's configuration
LIGHTNING = "pytorch-lightning_version"
MODEL = "model."  # before the names of a module's model
RUNNING_MEAN = "running_mean"  # in a file that holds the running mean of a run's weights: what it followed
NO_STATE = (
    "holds the running mean of a run's weights (--ema), and no state to go on from. Expected one of RUN/checkpoints/. "
    "To begin a run with these weights: --pretrained FILE."
)
# Arguments whose tensors are a part of a run and not of the model, as they are in a file that holds a model alone.
OF_RUN = {"ema": 0.0, "distillation": "none"}
OF_CUSTOM_WRAPPER = "sink_temp"  # a parameter of train-CLIP's CustomCLIPWrapper


def find_checkpoint(contents: Contents) -> Found | None:
    """A checkpoint of ``train`` or ``finetune``."""
    arguments = contents.data.get("hyper_parameters")
    if not isinstance(arguments, Mapping):
        return None
    if not {"image_encoder", "text_encoder"} <= set(arguments) and not _is_config(arguments.get("config")):
        return None
    config = None
    if "text_encoder" not in arguments:
        config = config_from_dict(arguments["config"], str(contents.path))
    return Found(
        "train-clip checkpoint",
        config,
        without_prefix(contents.tensors, MODEL),
        arguments=arguments,
        about=progress(contents.data),
    )


def find_safetensors(contents: Contents) -> Found | None:
    """A file of ``train-clip convert --to safetensors``."""
    if METADATA not in contents.metadata:
        return None
    try:
        values = json.loads(contents.metadata[METADATA])
        if not isinstance(values, dict):
            raise ValueError("no keys and values")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{contents.path}: its metadata tell of no model ({error}). Write the file again.") from error
    return Found("train-clip safetensors", config_from_dict(values, str(contents.path)), contents.tensors)


def find_train_clip(contents: Contents) -> Found | None:
    """A checkpoint of train-CLIP's CLIPWrapper, whose model is OpenAI's, QuickGELU included (its models/model.py)."""
    if LIGHTNING not in contents.data or not any(name.startswith(MODEL) for name in contents.tensors):
        return None
    if OF_CUSTOM_WRAPPER in contents.tensors:
        raise UserError(
            f"{contents.path}: two encoders of train-CLIP's CustomCLIPWrapper, and the file does not say which. Make "
            "them, fill them with its tensors below model.visual. and model.transformer., and give them to "
            "train_clip.CustomCLIPWrapper."
        )
    records = without_prefix(contents.tensors, MODEL)
    config = config_from_shapes(records, contents.path)
    return Found("train-CLIP checkpoint (CLIPWrapper)", config, records, about=progress(contents.data))


def _is_config(config: Any) -> bool:
    """Whether it is ours, of two towers; train-CLIP's is flat, or a path, or whatever its user made of it."""
    return isinstance(config, Mapping) and {"image", "text"} <= set(config)


def progress(data: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run of Lightning's had come."""
    names = {"global_step": "step", "epoch": "epoch", LIGHTNING: "Lightning"}
    mean = data.get(RUNNING_MEAN)
    of_mean = {}
    if isinstance(mean, Mapping):
        of_mean["running mean of weights"] = f"momentum {mean.get('momentum')}, {mean.get('updates')} updates"
    return of_mean | {shown: data[name] for name, shown in names.items() if name in data}
