"""Image classifiers of torchvision without their last layer: by name, and from a description."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import torch
from torch import nn

from train_clip.encoders.encoder import ImageEncoder, Pixels, measured, rebuilt, three_channels
from train_clip.errors import UserError, first_line

# Where torchvision's classifiers end; the last nn.Linear below is the one that names the classes.
HEADS = ("fc", "classifier", "head", "heads")


def load_image(name: str) -> ImageEncoder:
    """Load a pretrained image encoder: what the last layer of a classifier takes.

    Args:
        name: such as resnet50, vit_b_16 or convnext_tiny.

    Raises:
        UserError: an unknown name, weights that are not reachable, or a network without such a layer.
    """
    models = _models()
    _check_name(models, name)
    weights = models.get_model_weights(name).DEFAULT
    try:
        module = models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision:{name}: its weights are not in this machine's cache and not reachable, or damaged "
            f"({first_line(error)}). Copy {weights.url} into {torch.hub.get_dir()}/checkpoints."
        ) from error
    _take_head_off(module, name)
    trained_on = weights.transforms()
    pixels = Pixels(trained_on.crop_size[0], three_channels(trained_on.mean), three_channels(trained_on.std))
    return measured(module, pixels, {"source": "torchvision", "name": name})


def build_image(description: dict[str, Any]) -> ImageEncoder:
    """Build an image encoder from its description, with random weights."""
    models, name = _models(), description["name"]
    _check_name(models, name)
    module = models.get_model(name, weights=None)
    _take_head_off(module, name)
    return rebuilt(module.eval(), description)


def _take_head_off(module: nn.Module, name: str) -> None:
    """Replace the layer that names the classes by nothing."""
    if hasattr(module, "aux_logits"):
        raise UserError(
            f"torchvision:{name}: classifies half-way too, which is not supported. Take another, such as resnet50."
        )
    head = next((head for head in HEADS if isinstance(getattr(module, head, None), nn.Module)), "")
    linear = [path for path, part in module.named_modules() if isinstance(part, nn.Linear) and _below(path, head)]
    if not head or not linear:
        raise UserError(
            f"torchvision:{name}: found no nn.Linear at the end, under {', '.join(HEADS)}. Expected a classifier whose "
            "last layer can be taken off. Take another, such as resnet50."
        )
    parent, _, last = linear[-1].rpartition(".")
    setattr(module.get_submodule(parent), last, nn.Identity())


def _below(path: str, head: str) -> bool:
    return path == head or path.startswith(f"{head}.")


def _check_name(models: Any, name: str) -> None:
    """Stop at what is not among torchvision's image classifiers."""
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise UserError(
            f"torchvision:{name}: torchvision has no such image classifier. "
            + (f"Similar: {', '.join(close)}." if close else f"Known: {', '.join(known)}.")
        )


def _models() -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise UserError(
            f"torchvision: encoders of this source need the package torchvision ({first_line(error)}). "
            "Install it: pip install torchvision."
        ) from None
