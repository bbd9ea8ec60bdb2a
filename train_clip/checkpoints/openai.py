"""OpenAI's files, TorchScript archives and state dicts, and model sizes from names and shapes."""

import math
from dataclasses import replace
from typing import Any

from train_clip.checkpoints import found, read
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, ResNetConfig, config_from_dict

HEAD = 64  # channels of an attention head in OpenAI's models, which no tensor tells
# Whole numbers that OpenAI's archives hold as tensors; sizes are in the other tensors' shapes too.
MARKS = ("input_resolution", "context_length", "vocab_size")
MASK = "attn_mask"  # of the causal attention: a constant, which some archives keep with each block
# In a TorchScript archive each module has the name of its class: that of a block's activation tells which it is.
ACTIVATION = "transformer.resblocks.0.mlp.gelu"
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}


def find_openai(contents: read.Contents) -> found.FoundCLIP | None:
    """Find a TorchScript archive, a state dict with the three numbers of OpenAI's, or weights under its names alone."""
    is_openai, is_script = set(MARKS) <= set(contents.tensors), contents.kind == "TorchScript archive"
    if not (is_openai or is_script or "visual.conv1.weight" in contents.tensors):
        return None
    kind = "OpenAI's" if is_openai else "TorchScript" if is_script else "state dict under OpenAI's names"
    records = {name: one for name, one in contents.tensors.items() if name.rpartition(".")[2] not in (*MARKS, MASK)}
    # Sizes beside the weights are OpenAI's habit, and with them come its activation and its heads.
    clip = found_by_shapes(kind, contents, records, is_openai=is_openai)
    if is_script:
        # With whatever prefix the script has before the names of the model; both towers have the same.
        classes = {kind.rpartition(".")[2] for name, kind in contents.data.items() if name.endswith(ACTIVATION)}
        if len(classes) == 1 and (activation := ACTIVATIONS.get(classes.pop())):
            clip = replace(clip, config=replace(clip.config, activation=activation), says_activation=True)
    return clip


def found_by_shapes(
    kind: str,
    contents: read.Contents,
    records: dict[str, read.TensorRecord],
    is_openai: bool = False,
    about: Any = None,
) -> found.FoundCLIP:
    """A CLIP with sizes from its shapes, which do not show the activation, or the heads if it is not a preset."""
    config = config_from_shapes(records, contents)
    return found.FoundCLIP(
        format=kind,
        source=str(contents.path),
        records=records,
        about=about or {},
        config=config,
        says_activation=is_openai,
        says_heads=is_openai or config.preset() is not None,
    )


def config_from_shapes(records: dict[str, read.TensorRecord], contents: read.Contents) -> ModelConfig:
    """Tell a model's sizes, with heads of 64 channels as in OpenAI's models (openai/CLIP, model.py, build_model)."""
    path, shapes = contents.path, {key: record.shape for key, record in records.items()}
    try:
        width = shapes["ln_final.weight"][0]
        values: dict[str, Any] = {
            "name": path.stem,
            "embed_dim": shapes["text_projection"][1],
            "image": _image(shapes),
            "text": {
                "context": shapes[found.OF_TEXT][0],
                "vocab": shapes["token_embedding.weight"][0],
                "layers": _count(shapes, "transformer.resblocks."),
                "width": width,
                "heads": max(1, width // HEAD),
            },
            "logit_bias": "logit_bias" in shapes,
        }
    except (LookupError, ValueError) as error:
        some = ", ".join(list(shapes)[:5])
        raise UserError(
            f"{path}: not a CLIP in OpenAI's form, a tensor is missing or has other dimensions ({error!r}). It has "
            f"{some}."
        ) from error
    return config_from_dict(values, str(path)).named_as_preset()


def _image(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    is_vit = "visual.class_embedding" in shapes
    side = math.isqrt(shapes[found.OF_IMAGES[not is_vit]][0] - 1)
    if is_vit:
        width, _, patch, _ = shapes["visual.conv1.weight"]
        layers = _count(shapes, "visual.transformer.resblocks.")
        return {"size": side * patch, "patch": patch, "layers": layers, "width": width, "heads": max(1, width // HEAD)}
    blocks = [_count(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    width = shapes["visual.layer1.0.conv1.weight"][0]
    return {"size": side * ResNetConfig.pixels_per_place, "blocks": blocks, "width": width}


def _count(names: dict[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
