"""OpenAI's files: TorchScript archives of half-precision weights, and state dicts of their models.

The shapes of a CLIP's weights → its configuration (as openai/CLIP, model.py, build_model).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from train_clip.checkpoints.found import Found, Tensors
from train_clip.checkpoints.read import Contents, TensorRecord
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, ViTConfig, config_from_dict, presets

HEAD = 64  # channels of an attention head in OpenAI's models, which no tensor tells
TENSORS_OF_LAYER = 12  # of a transformer's block; a ResNet's has more
STRIDE = 32  # pixels of the image to a place of a ResNet's last map


def config_from_shapes(tensors: Mapping[str, TensorRecord], path: Path) -> ModelConfig:
    """Tell a model's sizes, with heads of 64 channels as in OpenAI's models.

    Args:
        tensors: under OpenAI's names.
        path: of the file, which names a model that is none of the presets.

    Raises:
        UserError: no CLIP of this form.
    """
    shapes = {key: record.shape for key, record in tensors.items()}
    try:
        image = _vit(shapes) if "visual.class_embedding" in shapes else _resnet(shapes)
        width = shapes["ln_final.weight"][0]
        text = {
            "context": shapes["positional_embedding"][0],
            "vocab": shapes["token_embedding.weight"][0],
            "layers": _count(shapes, "transformer.resblocks."),
            "width": width,
            "heads": max(1, width // HEAD),
        }
        embed_dim = shapes["text_projection"][1]
    except KeyError as error:
        raise UserError(f"{path}: no CLIP of OpenAI's form, it lacks {error}. It has {_some(shapes)}.") from error
    except (IndexError, ValueError) as error:
        raise UserError(
            f"{path}: no CLIP of OpenAI's form, a tensor has another number of dimensions, or positions, than there."
        ) from error
    values = {"name": path.stem, "embed_dim": embed_dim, "image": image, "text": text}
    values["logit_bias"] = "logit_bias" in shapes
    return named_as_preset(config_from_dict(values, str(path)))


def require_layers(config: ModelConfig, records: Collection[str], source: str) -> None:
    """Refuse a configuration with more layers than there are tensors for, before a model is built of it.

    Raises:
        UserError: it has.
    """
    image = config.image
    layers = config.text.layers + (image.layers if isinstance(image, ViTConfig) else sum(image.blocks))
    if layers * TENSORS_OF_LAYER > len(records) + TENSORS_OF_LAYER:
        raise UserError(f"{source}: {layers:,} layers, and {len(records):,} tensors, which are too few for them.")


def named_as_preset(config: ModelConfig) -> ModelConfig:
    """A model of a preset's sizes gets its name and its optimizer's numbers."""
    preset = preset_of(config)
    if preset is None:
        return config
    return dataclasses.replace(config, name=preset.name, optimizer=preset.optimizer)


def preset_of(config: ModelConfig) -> ModelConfig | None:
    """The preset of these sizes, whatever its activation; None where there is none."""

    def sizes(one: ModelConfig) -> tuple[Any, ...]:
        """What two models of one form have in common."""
        return one.embed_dim, one.image, one.text

    return next((preset for preset in presets() if sizes(preset) == sizes(config)), None)


def describe(config: ModelConfig) -> dict[str, str]:
    """A model's sizes in words, by their heading."""
    image, text = config.image, config.text
    kind = "ViT" if isinstance(image, ViTConfig) else "ResNet"
    of_image = (
        f"{image.layers} layers of {image.width}, {image.heads} heads, patches of {image.patch} pixels"
        if isinstance(image, ViTConfig)
        else f"blocks {'-'.join(map(str, image.blocks))}, width {image.width}"
    )
    of_text = f"{text.layers} layers of {text.width}, {text.heads} heads"
    return {
        "image tower": f"{kind} of {of_image}, {image.size}×{image.size} pixels",
        "text tower": f"{of_text}, {text.context} tokens of {text.vocab:,}",
        "embedding": f"{config.embed_dim} numbers",
    }


def _vit(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    width, _, patch, _ = shapes["visual.conv1.weight"]
    side = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    layers = _count(shapes, "visual.transformer.resblocks.")
    return {"size": side * patch, "patch": patch, "layers": layers, "width": width, "heads": max(1, width // HEAD)}


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    side = math.isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1)
    blocks = [_count(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return {"size": side * STRIDE, "blocks": blocks, "width": shapes["visual.layer1.0.conv1.weight"][0]}


def _count(names: Iterable[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:5])


# Whole numbers that OpenAI's archives hold as tensors; sizes are in the other tensors' shapes too.
MARKS = ("input_resolution", "context_length", "vocab_size")
MASK = "attn_mask"  # of the causal attention: a constant, which some archives keep with each block

# In a TorchScript archive each module has the name of its class: that of a block's activation tells which it is.
ACTIVATION = "transformer.resblocks.0.mlp.gelu"
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}


def find_openai(contents: Contents) -> Found | None:
    """A TorchScript archive, or a state dict with the three numbers of OpenAI's."""
    is_openai = set(MARKS) <= set(contents.tensors)
    if not is_openai and contents.kind != "TorchScript archive":
        return None
    records = {
        name: record for name, record in contents.tensors.items() if name.rpartition(".")[2] not in (*MARKS, MASK)
    }
    config = config_from_shapes(records, contents.path)
    activation = ACTIVATIONS.get(str(contents.data.get(ACTIVATION)).rpartition(".")[2])
    name = "OpenAI's" if is_openai else "TorchScript"
    # Sizes beside the weights are OpenAI's habit, and with them come its activation and its heads.
    unsaid = () if is_openai else unsaid_of(config)
    if activation is not None:
        config = dataclasses.replace(config, activation=activation)
        unsaid = tuple(word for word in unsaid if word != "activation")
    return Found(name, config, records, unsaid=unsaid)


def find_state_dict(contents: Contents) -> Found | None:
    """Weights under OpenAI's names and nothing else."""
    if "visual.conv1.weight" not in contents.tensors:
        return None
    config = config_from_shapes(contents.tensors, contents.path)
    return Found(
        "state dict under OpenAI's names", config, contents.tensors, scalar_temperature, unsaid=unsaid_of(config)
    )


def scalar_temperature(tensors: Tensors) -> Tensors:
    """The temperature of some of open_clip's models has one dimension, of size 1, and so has their bias."""
    found = {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
    return {**tensors, **{name: tensor.reshape(()) for name, tensor in found.items() if tensor.numel() == 1}}


def unsaid_of(config: ModelConfig) -> tuple[str, ...]:
    """What shapes alone leave open: the activation, and the heads of a model that is none of the presets."""
    return ("activation",) if preset_of(config) is not None else ("activation", "heads")
