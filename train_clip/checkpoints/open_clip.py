"""open_clip's files: weights with a configuration beside them, and the checkpoints of its training.

Its CLIP has OpenAI's names; its CustomTextCLIP, where the text tower is a plain one, has ``text.`` before that tower's.
Which settings there are, and their defaults: github.com/mlfoundations/open_clip, model.py, CLIPVisionCfg, CLIPTextCfg.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_clip.checkpoints.found import FoundCLIP, require_usual
from train_clip.checkpoints.openai import HEAD, found_by_shapes, named_as_preset, scalar_temperature
from train_clip.checkpoints.read import Contents
from train_clip.checkpoints.sources import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from train_clip.errors import UserError, first_line
from train_clip.files import write_text
from train_clip.models.config import START_OF_SIGMOID, ModelConfig, ResNetConfig, config_from_dict

if TYPE_CHECKING:
    from train_clip.models.clip import CLIP

TRAINING = ("epoch", "name", "state_dict")  # of a checkpoint that its training wrote
TEXT = "text."
# The text tower's settings: our name, their default.
OF_TEXT = {
    **{"context_length": ("context", 77), "vocab_size": ("vocab", 49408)},
    **{"width": ("width", 512), "heads": ("heads", 8), "layers": ("layers", 12)},
}

# What a configuration may say: this value, or any (None), which is read, or changes nothing. All else that is set is
# refused.
KNOWN: dict[str, dict[str, Any]] = {
    "model_cfg": dict.fromkeys(
        "embed_dim quick_gelu vision_cfg text_cfg init_logit_bias custom_text init_logit_scale "
        "nonscalar_logit_scale".split()
    ),
    "vision_cfg": {"mlp_ratio": 4.0, "pool_type": "tok", "pos_embed_type": "learnable"}
    | dict.fromkeys(
        "image_size layers width head_width patch_size patch_dropout attn_pooler_queries attn_pooler_heads "
        "output_tokens".split()
    ),
    "text_cfg": {"mlp_ratio": 4.0, "pool_type": "argmax", "proj_type": "linear"}
    | dict.fromkeys((*OF_TEXT, "pad_id", "eos_id")),
}
RESIZING = {"interpolation": ("bicubic",), "resize_mode": ("", "shortest")}  # a value may be left out
CHANGE = "To go on with that, change the file."


def find_open_clip(contents: Contents) -> FoundCLIP | None:
    """Find weights beside its configuration, a checkpoint of its training, or weights of its CustomTextCLIP."""
    records, source = contents.tensors, str(contents.path)
    if is_custom := f"{TEXT}token_embedding.weight" in records:
        records = {name.removeprefix(TEXT): record for name, record in records.items()}
    if not any(name.startswith("visual.") for name in records):
        return None
    if OPEN_CLIP_CONFIG in contents.configs:
        config = _read_config(contents.settings(OPEN_CLIP_CONFIG), source)
        return FoundCLIP(format="open_clip", source=source, records=records, config=config, rename=scalar_temperature)
    if set(TRAINING) <= set(contents.data):
        about = {"epoch": contents.data["epoch"], "run": contents.data["name"]}
        return found_by_shapes("open_clip training checkpoint", contents, records, about=about)
    return found_by_shapes("open_clip state dict", contents, records) if is_custom else None


def write_open_clip(model: "CLIP", folder: Path) -> None:
    """Write what ``open_clip.create_model("local-dir:FOLDER")`` takes."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / OPEN_CLIP_WEIGHTS)
    write_text(folder / OPEN_CLIP_CONFIG, json.dumps(write_config(model.config), indent=2) + "\n")


def write_config(config: ModelConfig) -> dict[str, Any]:
    """What ``open_clip_config.json`` says of a model."""
    image, text = config.image, config.text
    vision: dict[str, Any] = {"image_size": image.size, "width": image.width}
    if isinstance(image, ResNetConfig):
        vision |= {"layers": list(image.blocks), "patch_size": None}
    else:
        vision |= {"layers": image.layers, "patch_size": image.patch, "head_width": image.width // image.heads}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": {theirs: getattr(text, ours) for theirs, (ours, _) in OF_TEXT.items()},
            **({f"init_{name}": value for name, value in START_OF_SIGMOID.items()} if config.logit_bias else {}),
        },
        "preprocess_cfg": {"mean": list(config.mean), "std": list(config.std)}
        | {name: known[-1] for name, known in RESIZING.items()},
    }


def _read_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    model, pixels = values.get("model_cfg", values), values.get("preprocess_cfg", {})
    try:
        for part, found in (("model_cfg", model), ("vision_cfg", model["vision_cfg"]), ("text_cfg", model["text_cfg"])):
            for name, value in found.items():
                if value and KNOWN[part].get(name, ...) not in (None, value):
                    what = "an image tower of timm" if name.startswith("timm_") else f"{part}.{name} = {value!r}"
                    raise UserError(
                        f"{source}: {OPEN_CLIP_CONFIG} has {what}, which CLIP's own towers do not have. Its encoders "
                        "can be joined by `train-clip finetune` (timm:NAME, hf:NAME) if their weights lie there."
                    )
        resized = "preprocess_cfg.{name} = {value!r}; images are resized as CLIP's are, {name}"
        require_usual(pixels, RESIZING, source, f"{OPEN_CLIP_CONFIG} has {resized} {{known!r}}. {CHANGE}")
        colours = {name: pixels[name] for name in ("mean", "std") if pixels.get(name)}
        return named_as_preset(config_from_dict(_sizes(model, source) | colours, source))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        reason = first_line(error)
        raise UserError(f"{source}: {OPEN_CLIP_CONFIG} is not as open_clip writes it ({reason}).") from error


def _sizes(model: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A preset's form, with open_clip's defaults for what is left out."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    width, head_width, layers = vision.get("width", 768), vision.get("head_width", HEAD), vision.get("layers", 12)
    image: dict[str, Any] = {"size": vision.get("image_size", 224), "width": width}
    if not isinstance(layers, list):
        image |= {"patch": vision.get("patch_size", 16), "layers": layers, "heads": width // head_width}
    elif head_width == HEAD:
        image |= {"blocks": layers}
    else:
        raise UserError(
            f"{source}: {OPEN_CLIP_CONFIG} has vision_cfg.head_width = {head_width} for a ResNet; CLIP's pool with "
            f"heads of {HEAD} channels."
        )
    return {
        **{"name": Path(source).stem, "embed_dim": model["embed_dim"], "image": image},
        "text": {ours: text.get(theirs, usual) for theirs, (ours, usual) in OF_TEXT.items()},
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "logit_bias": model.get("init_logit_bias") is not None,
    }
