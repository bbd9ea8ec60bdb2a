"""OpenAI's files, TorchScript archives and state dicts, and what its names and shapes tell.

L  positions      W  width      G  places of the grid along a side
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train_clip.checkpoints.found import FoundCLIP, Tensors
from train_clip.checkpoints.read import Contents, TensorRecord
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, ResNetConfig, config_from_dict, presets

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 64  # channels of an attention head in OpenAI's models, which no tensor tells
# Whole numbers that OpenAI's archives hold as tensors; sizes are in the other tensors' shapes too.
MARKS = ("input_resolution", "context_length", "vocab_size")
MASK = "attn_mask"  # of the causal attention: a constant, which some archives keep with each block
# In a TorchScript archive each module has the name of its class: that of a block's activation tells which it is.
ACTIVATION = "transformer.resblocks.0.mlp.gelu"
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
OF_IMAGES = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
OF_TEXT = "positional_embedding"


def find_openai(contents: Contents) -> FoundCLIP | None:
    """Find a TorchScript archive, a state dict with the three numbers of OpenAI's, or weights under its names alone."""
    is_openai = set(MARKS) <= set(contents.tensors)
    kind = "OpenAI's" if is_openai else "TorchScript" if contents.kind == "TorchScript archive" else None
    if kind is None and "visual.conv1.weight" not in contents.tensors:
        return None
    left_out = () if kind is None else (*MARKS, MASK)
    records = {name: value for name, value in contents.tensors.items() if name.rpartition(".")[2] not in left_out}
    # Sizes beside the weights are OpenAI's habit, and with them come its activation and its heads.
    said = {"unsaid": ()} if is_openai else {}
    found = found_by_shapes(kind or "state dict under OpenAI's names", contents, records, **said)
    activation = ACTIVATIONS.get(str(contents.data.get(ACTIVATION)).rpartition(".")[2])
    if activation is None:
        return found
    unsaid = tuple(word for word in found.unsaid if word != "activation")
    return dataclasses.replace(found, config=dataclasses.replace(found.config, activation=activation), unsaid=unsaid)


def found_by_shapes(kind: str, contents: Contents, records: Mapping[str, TensorRecord], **told: Any) -> FoundCLIP:
    """A CLIP whose sizes the shapes tell: not the activation, nor the heads of a model that is none of the presets."""
    config = config_from_shapes(records, contents)
    unsaid = ("activation",) if _preset_of(config) is not None else ("activation", "heads")
    told = {"unsaid": unsaid, "rename": scalar_temperature} | told
    return FoundCLIP(format=kind, source=str(contents.path), records=records, config=config, **told)


def config_from_shapes(records: Mapping[str, TensorRecord], contents: Contents) -> ModelConfig:
    """Tell a model's sizes, with heads of 64 channels as in OpenAI's models (openai/CLIP, model.py, build_model)."""
    path, shapes = contents.path, {key: record.shape for key, record in records.items()}
    try:
        width = shapes["ln_final.weight"][0]
        values: dict[str, Any] = {
            "name": path.stem,
            "embed_dim": shapes["text_projection"][1],
            "image": _vit(shapes) if "visual.class_embedding" in shapes else _resnet(shapes),
            "text": {
                "context": shapes[OF_TEXT][0],
                "vocab": shapes["token_embedding.weight"][0],
                "layers": _count(shapes, "transformer.resblocks."),
                "width": width,
                "heads": max(1, width // HEAD),
            },
            "logit_bias": "logit_bias" in shapes,
        }
    except KeyError as error:
        some = ", ".join(list(shapes)[:5])
        raise UserError(f"{path}: no CLIP of OpenAI's form, it lacks {error}. It has {some}.") from error
    except (IndexError, ValueError) as error:
        raise UserError(
            f"{path}: no CLIP of OpenAI's form, a tensor has another number of dimensions, or positions, than there."
        ) from error
    return named_as_preset(config_from_dict(values, str(path)))


def named_as_preset(config: ModelConfig) -> ModelConfig:
    """Give a model of a preset's sizes its name and its optimizer's numbers."""
    preset = _preset_of(config)
    return config if preset is None else dataclasses.replace(config, name=preset.name, optimizer=preset.optimizer)


def _preset_of(config: ModelConfig) -> ModelConfig | None:
    return next((preset for preset in presets() if preset.sizes == config.sizes), None)


def _vit(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    width, _, patch, _ = shapes["visual.conv1.weight"]
    side = math.isqrt(shapes[OF_IMAGES[0]][0] - 1)
    layers = _count(shapes, "visual.transformer.resblocks.")
    return {"size": side * patch, "patch": patch, "layers": layers, "width": width, "heads": max(1, width // HEAD)}


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    side = math.isqrt(shapes[OF_IMAGES[1]][0] - 1) * ResNetConfig.pixels_per_place
    blocks = [_count(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return {"size": side, "blocks": blocks, "width": shapes["visual.layer1.0.conv1.weight"][0]}


def _count(names: Mapping[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def scalar_temperature(tensors: Tensors) -> Tensors:
    """The temperature of some of open_clip's models has one dimension, of size 1, and so has their bias."""
    found = {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
    return {**tensors, **{name: tensor.reshape(()) for name, tensor in found.items() if tensor.numel() == 1}}


def resize_image_positions(tensors: Tensors, side: int) -> Tensors:
    """Interpolate the grid of an image tower's positions, bicubic with antialiasing, as open_clip does (its model.py).

    The first position, of the class token or the mean, stays: (1 + G², W) → (1 + side², W).
    """
    import torch

    def resized(positions: "Tensor") -> "Tensor":
        now = math.isqrt(max(0, len(positions) - 1)) if positions.ndim == 2 else 0
        if now in (0, side) or now**2 + 1 != len(positions):
            return positions  # as they are, or no grid: strict loading says what they are instead
        square = positions[1:].T.unflatten(1, (now, now))[None]
        grid = torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True)
        return torch.cat([positions[:1], grid[0].flatten(1).T])

    return {name: resized(tensor) if name in OF_IMAGES else tensor for name, tensor in tensors.items()}


def resize_text_positions(tensors: Tensors, context: int) -> Tensors:
    """Fewer positions, (L, W) → (context, W), are the first ones; more are interpolated linearly, as open_clip does."""
    import torch

    positions = tensors.get(OF_TEXT)
    if positions is None or not positions.ndim:
        return tensors
    resized = positions[:context]
    if positions.ndim == 2 and context > len(positions):
        resized = torch.nn.functional.interpolate(positions.T[None], context, mode="linear")[0].T.contiguous()
    return {**tensors, OF_TEXT: resized}
