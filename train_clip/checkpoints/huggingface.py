"""Hugging Face's CLIPModel: a folder of ``config.json``, weights, and what its processor reads.

Names and settings: github.com/huggingface/transformers, models/clip. Its blocks keep queries, keys and values in
matrices of their own, and its projections transposed.

W  width of a tower      D  embedding width
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_clip.checkpoints.found import Found, Tensors
from train_clip.checkpoints.openai import named_as_preset
from train_clip.checkpoints.read import HF_CONFIG, HF_PIXELS, HF_PROCESSOR, Contents
from train_clip.errors import UserError, first_line
from train_clip.models.config import ModelConfig, config_from_dict

TOWERS = {"vision_model.": "visual.", "text_model.": ""}
# Theirs → ours, within a tower and within a block.
OF_TOWER = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}
OF_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
OWN_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
POSITIONS = "position_ids"  # a count, which older versions kept as a tensor

EPS = 1e-5  # of its layer norms, and ours
# The defaults of its CLIPVisionConfig and CLIPTextConfig, where config.json leaves them out.
OF_BOTH: dict[str, Any] = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": EPS}
VISION = OF_BOTH | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
VISION |= {"image_size": 224, "patch_size": 32, "num_channels": 3}
TEXT = OF_BOTH | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77}
# Configurations from before transformers knew another end token have 2, and are read at the largest id.
LARGEST = 2
END = 49_407  # CLIP's end token; its tokenizer's module has it too, and imports PyTorch
BICUBIC = 3  # as Pillow counts


def find_huggingface(contents: Contents) -> Found | None:
    """Weights of a CLIPModel, with ``config.json`` beside them."""
    if not any(name.startswith("vision_model.") for name in contents.tensors):
        return None
    if HF_CONFIG not in contents.configs:
        raise UserError(
            f"{contents.path}: weights under Hugging Face's names, without {HF_CONFIG} beside them, which says what "
            "the model is. Give the folder that save_pretrained or `hf download` wrote."
        )
    source = str(contents.path)
    try:
        of_processor = contents.settings(HF_PROCESSOR).get("image_processor", {})
        pixels = contents.settings(HF_PIXELS) or of_processor
        config = _read_config(contents.settings(HF_CONFIG), pixels, source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: its {HF_CONFIG} is not as Hugging Face writes it ({first_line(error)}).") from error
    records = {name: record for name, record in contents.tensors.items() if not name.endswith(POSITIONS)}
    return Found("Hugging Face CLIPModel", config, records, rename)


def rename(tensors: Tensors) -> Tensors:
    """Their names and shapes → ours."""
    import torch

    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in PROJECTIONS:
            renamed[PROJECTIONS[name]] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        elif "self_attn.q_proj." in name:
            parts = [tensors.get(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            if any(part is None or part.shape != tensor.shape for part in parts):
                raise UserError(f"{name}: its k_proj or v_proj is missing, or of another shape. Get the folder again.")
            renamed[_own_name(name.replace("q_proj.", "in_proj_"))] = torch.cat(parts)  # type: ignore[arg-type]
        elif "self_attn.k_proj." not in name and "self_attn.v_proj." not in name:
            renamed[_own_name(name)] = tensor
    return renamed


def end_token(vocab: int) -> int:
    """The id at which a caption's feature is read: CLIP's, or the largest of a smaller vocabulary."""
    return min(vocab - 1, END)


def rename_back(state: Tensors) -> Tensors:
    """Our names and shapes → theirs."""
    renamed: dict[str, Any] = {}
    projections = {ours: theirs for theirs, ours in PROJECTIONS.items()}
    of_tower, of_block = ({ours: theirs for theirs, ours in names.items()} for names in (OF_TOWER, OF_BLOCK))
    for name, tensor in state.items():
        if name in projections:
            renamed[projections[name]] = tensor.T
            continue
        tower = "vision_model." if name.startswith("visual.") else "text_model."
        rest = name.removeprefix("visual.")
        found = OWN_BLOCK.fullmatch(rest)
        if found and "in_proj_" in found[2]:
            kind = found[2].removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{tower}encoder.layers.{found[1]}.self_attn.{letter}_proj.{kind}"] = part
        elif found:
            renamed[f"{tower}encoder.layers.{found[1]}.{_replace_start(found[2], of_block)}"] = tensor
        elif rest == "logit_scale":
            renamed[rest] = tensor
        else:
            renamed[tower + _replace_start(rest, of_tower)] = tensor
    return renamed


def _own_name(name: str) -> str:
    """A name of theirs, of one whole tensor, as ours; what is unknown stays, for strict loading to name it."""
    for theirs, ours in TOWERS.items():
        if not name.startswith(theirs):
            continue
        rest = name.removeprefix(theirs)
        if found := BLOCK.fullmatch(rest):
            in_block = _replace_start(found[2], OF_BLOCK).replace("self_attn", "attn")
            return f"{ours}transformer.resblocks.{found[1]}.{in_block}"
        return ours + _replace_start(rest, OF_TOWER)
    return name


def _replace_start(name: str, starts: Mapping[str, str]) -> str:
    """Replace the words with which a name begins."""
    for old, new in starts.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def _read_config(values: Mapping[str, Any], pixels: Mapping[str, Any], source: str) -> ModelConfig:
    if values.get("model_type") != "clip":
        raise UserError(
            f"{source}: {HF_CONFIG} has model_type {values.get('model_type')!r}; expected 'clip'. The towers of other "
            "models can be joined: train-clip finetune --image_encoder hf:NAME --text_encoder hf:NAME."
        )
    vision, text = (_tower(values, name, usual) for name, usual in (("vision_config", VISION), ("text_config", TEXT)))
    for part in (vision, text):
        _require(part["intermediate_size"] == 4 * part["hidden_size"], part, "intermediate_size", source)
        _require(part["layer_norm_eps"] == EPS, part, "layer_norm_eps", source)
        _require(part["hidden_act"] == vision["hidden_act"], part, "hidden_act", source)
    _require(vision["num_channels"] == 3, vision, "num_channels", source)
    _require(
        text.get("eos_token_id", LARGEST) in (LARGEST, end_token(text["vocab_size"])), text, "eos_token_id", source
    )
    _require_pixels(pixels, vision["image_size"], source)
    config = config_from_dict(
        {
            "name": Path(source).name,
            "embed_dim": values.get("projection_dim", 512),
            "activation": vision["hidden_act"],
            **{name: found for name in ("mean", "std") if (found := pixels.get(f"image_{name}"))},
            "image": {
                "size": vision["image_size"],
                "patch": vision["patch_size"],
                "layers": vision["num_hidden_layers"],
                "width": vision["hidden_size"],
                "heads": vision["num_attention_heads"],
            },
            "text": {
                "context": text["max_position_embeddings"],
                "vocab": text["vocab_size"],
                "layers": text["num_hidden_layers"],
                "width": text["hidden_size"],
                "heads": text["num_attention_heads"],
            },
        },
        source,
    )
    return named_as_preset(config)


def _require(right: bool, part: Mapping[str, Any], name: str, source: str) -> None:
    if not right:
        raise UserError(
            f"{source}: {HF_CONFIG} has {name} = {part.get(name)!r}, which CLIP's own towers do not have. Its towers "
            "can be joined: train-clip finetune --image_encoder hf:NAME --text_encoder hf:NAME."
        )


def _tower(values: Mapping[str, Any], name: str, usual: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's settings. Older versions wrote a copy under another name, which wins there, defaults and all."""
    copied = values.get(f"{name}_dict")
    return {**usual, **(values.get(name) or {}), **({**usual, **copied} if copied else {})}


def _require_pixels(pixels: Mapping[str, Any], size: int, source: str) -> None:
    """Refuse preprocessing of another kind than CLIP's."""
    square = {"height": size, "width": size}
    usual: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
        **{"resample": (BICUBIC,), "size": (size, {"shortest_edge": size}), "crop_size": (size, square)},
    }
    for name, values in usual.items():
        if (found := pixels.get(name, values[0])) not in values:
            raise UserError(
                f"{source}: its preprocessing has {name} = {found!r}; images are prepared as CLIP's are, {name} "
                f"{values[-1]!r}. To go on with that, change the file."
            )
    factor = pixels.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{source}: its preprocessing has rescale_factor = {factor}; expected 1/255, as CLIP's.")
