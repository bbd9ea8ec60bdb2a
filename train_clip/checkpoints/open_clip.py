"""open_clip's files: weights with a configuration next to them, and its training checkpoints.

Its CLIP has OpenAI's names; its CustomTextCLIP, where the text tower is a plain one, has ``text.`` before that tower's.
Which settings there are, and their defaults: github.com/mlfoundations/open_clip, model.py, CLIPVisionCfg, CLIPTextCfg.
"""

import json
from pathlib import Path
from typing import Any

from train_clip.checkpoints import found, openai, read, sources
from train_clip.errors import UserError, first_line
from train_clip.models.config import START_OF_SIGMOID, ModelConfig, ResNetConfig, config_from_dict

TRAINING = ("epoch", "name", "state_dict")  # of a checkpoint that its training wrote
TEXT = "text."
# The image tower's settings, their defaults; the text tower's: our name, their default.
OF_IMAGES = {"image_size": 224, "layers": 12, "width": 768, "head_width": openai.HEAD, "patch_size": 16}
OF_TEXT = {
    **{"context_length": ("context", 77), "vocab_size": ("vocab", 49408)},
    **{"width": ("width", 512), "heads": ("heads", 8), "layers": ("layers", 12)},
}

# What a configuration may say: this value, or any (None), which is read, or changes nothing. All else that is set is
# refused.
KNOWN: dict[str, Any] = {
    "model_cfg": dict.fromkeys(
        "embed_dim quick_gelu vision_cfg text_cfg init_logit_bias custom_text init_logit_scale "
        "nonscalar_logit_scale".split()
    ),
    "vision_cfg": {"mlp_ratio": 4.0, "pool_type": "tok", "pos_embed_type": "learnable"}
    | dict.fromkeys((*OF_IMAGES, "patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens")),
    "text_cfg": {"mlp_ratio": 4.0, "pool_type": "argmax", "proj_type": "linear"}
    | dict.fromkeys((*OF_TEXT, "pad_id", "eos_id")),
}
RESIZING = {"interpolation": ("bicubic",), "resize_mode": ("", "shortest")}  # a value may be left out
CHANGE = "To use that anyway, change the file."


def find_open_clip(contents: read.Contents) -> found.FoundCLIP | None:
    """Find weights next to its configuration, its training checkpoint, or weights of its CustomTextCLIP."""
    records, source = contents.tensors, str(contents.path)
    if is_custom := f"{TEXT}token_embedding.weight" in records:
        records = {name.removeprefix(TEXT): record for name, record in records.items()}
    if not any(name.startswith("visual.") for name in records):
        return None
    if sources.OPEN_CLIP_CONFIG in contents.configs:
        config = _read_config(contents.settings(sources.OPEN_CLIP_CONFIG), source)
        return found.FoundCLIP(format="open_clip", source=source, records=records, config=config)
    if set(TRAINING) <= set(contents.data):
        about = {"epoch": contents.data["epoch"], "run": contents.data["name"]}
        return openai.found_by_shapes("open_clip training checkpoint", contents, records, about=about)
    return openai.found_by_shapes("open_clip state dict", contents, records) if is_custom else None


def write_open_clip(config: ModelConfig, tensors: found.Tensors, folder: Path) -> None:
    """Write what ``open_clip.create_model("local-dir:FOLDER")`` takes."""
    from safetensors.torch import save_file

    save_file(tensors, folder / sources.OPEN_CLIP_WEIGHTS)
    (folder / sources.OPEN_CLIP_CONFIG).write_text(json.dumps(write_config(config), indent=2) + "\n", encoding="utf-8")


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


def _read_config(values: dict[str, Any], source: str) -> ModelConfig:
    model, pixels = values.get("model_cfg", values), values.get("preprocess_cfg", {})
    try:
        parts = {"model_cfg": model, **model}
        for part, known in KNOWN.items():
            for name, value in parts[part].items():
                if value and known.get(name, ...) not in (None, value):
                    what = "an image tower of timm" if name.startswith("timm_") else f"{part}.{name} = {value!r}"
                    raise UserError(
                        f"{source}: open_clip_config.json has {what}, which CLIP's own towers do not have. Its "
                        "encoders can be joined by `train-clip finetune` (timm:NAME, hf:NAME) if their weights are "
                        "available there."
                    )
        resized = "preprocess_cfg.{name} = {value!r}; CLIP resizes images with {name}"
        found.require_usual(pixels, RESIZING, source, f"open_clip_config.json has {resized} {{known!r}}. {CHANGE}")
        colours = {name: pixels[name] for name in ("mean", "std") if pixels.get(name)}
        return config_from_dict(_sizes(model, source) | colours, source).named_as_preset()
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        reason = first_line(error)
        raise UserError(f"{source}: open_clip_config.json is not as open_clip writes it ({reason}).") from error


def _sizes(model: dict[str, Any], source: str) -> dict[str, Any]:
    """A preset's form, with open_clip's defaults for missing values."""
    vision = OF_IMAGES | model["vision_cfg"]
    image = {"size": found.side(vision["image_size"]), "width": vision["width"]}
    head_width, layers = vision["head_width"], vision["layers"]
    if not isinstance(layers, list):
        image |= {"patch": found.side(vision["patch_size"]), "layers": layers, "heads": vision["width"] // head_width}
    elif head_width == openai.HEAD:
        image |= {"blocks": layers}
    else:
        raise UserError(
            f"{source}: open_clip_config.json has vision_cfg.head_width = {head_width} for a ResNet; CLIP's pool with "
            f"heads of {openai.HEAD} channels."
        )
    return {
        **{"name": Path(source).stem, "embed_dim": model["embed_dim"], "image": image},
        "text": {ours: model["text_cfg"].get(theirs, usual) for theirs, (ours, usual) in OF_TEXT.items()},
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "logit_bias": model.get("init_logit_bias") is not None,
    }
