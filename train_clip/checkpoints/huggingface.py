"""Hugging Face's CLIPModel: a folder of ``config.json``, weights, and what its processor and tokenizer read.

Names and settings: github.com/huggingface/transformers, models/clip. Its blocks keep queries, keys and values in
matrices of their own, and its projections transposed.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from train_clip.checkpoints import found, read, sources
from train_clip.errors import UserError, first_line
from train_clip.models.config import ModelConfig, ViTConfig, config_from_dict

TOWERS = {"vision_model.": "visual.", "text_model.": ""}
# Theirs → ours, anywhere in a tensor's name.
WORDS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
POSITIONS = "position_ids"  # a count, which older versions kept as a tensor

EPS = 1e-5  # of its layer norms, and ours
# Settings of its towers → ours, and the defaults of its CLIPVisionConfig and CLIPTextConfig.
OF_BLOCKS = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
SETTINGS = {
    "vision_config": OF_BLOCKS | {"image_size": "size", "patch_size": "patch"},
    "text_config": OF_BLOCKS | {"max_position_embeddings": "context", "vocab_size": "vocab"},
}
OF_BOTH: dict[str, Any] = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
DEFAULTS = {
    "vision_config": OF_BOTH
    | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 32},
    "text_config": OF_BOTH
    | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    | {"vocab_size": 49408, "max_position_embeddings": 77},
}
# Configurations from before transformers knew another end token have 2, and are read at the largest id.
LARGEST = 2
END = 49_407  # CLIP's end token; its tokenizer's module has it too, and imports PyTorch
BICUBIC = 3  # as Pillow counts
JOIN = "train-clip finetune --image_encoder hf:NAME --text_encoder hf:NAME."
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def find_huggingface(contents: read.Contents) -> found.FoundCLIP | None:
    """Find weights of a CLIPModel with ``config.json`` next to them."""
    if not any(name.startswith("vision_model.") for name in contents.tensors):
        return None
    source = str(contents.path)
    if sources.HF_CONFIG not in contents.configs:
        raise UserError(
            f"{source}: weights under Hugging Face's names, without config.json next to them, which describes the "
            "model. Give the folder that save_pretrained or `hf download` wrote."
        )
    try:
        processor = contents.settings(sources.HF_PROCESSOR)
        pixels = contents.settings(sources.HF_PIXELS) or processor.get("image_processor", {})
        config = _read_config(contents.settings(sources.HF_CONFIG), pixels, source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: its config.json is not as Hugging Face writes it ({first_line(error)}).") from error
    records = {name: record for name, record in contents.tensors.items() if not name.endswith(POSITIONS)}
    kind = "Hugging Face CLIPModel"
    return found.FoundCLIP(format=kind, source=source, records=records, config=config, rename=rename)


def rename(tensors: found.Tensors) -> found.Tensors:
    """Their names and shapes → ours; a name that is unknown stays, for strict loading to name it."""
    import torch

    renamed = {}
    for name, tensor in tensors.items():
        ours = PROJECTIONS.get(name, _reworded(name, TOWERS | WORDS))
        renamed[ours] = tensor.transpose(0, -1).contiguous() if name in PROJECTIONS else tensor
    for query in [name for name in renamed if "attn.q_proj." in name]:
        parts = [query.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if all(part in renamed and renamed[part].shape == renamed[query].shape for part in parts):
            renamed[query.replace("q_proj.", "in_proj_")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _reworded(name: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def end_token(vocab: int) -> int:
    """The id at which a caption's feature is read: CLIP's, or the largest of a smaller vocabulary."""
    return min(vocab - 1, END)


def _read_config(values: dict[str, Any], pixels: dict[str, Any], source: str) -> ModelConfig:
    odd = (
        f"config.json has {{name}} = {{value!r}}, which CLIP's own towers do not have. Its towers can be joined: {JOIN}"
    )
    found.require_usual(values, {"model_type": ("clip",)}, source, odd)
    # Older versions wrote a copy under another name, which wins there, defaults and all.
    given = {name: values.get(f"{name}_dict") or values.get(name) or {} for name in DEFAULTS}
    towers = {name: usual | given[name] for name, usual in DEFAULTS.items()}
    vision, text = towers.values()
    vision |= {name: found.side(vision[name]) for name in ("image_size", "patch_size")}
    for tower in (vision, text):
        found.require_usual(
            tower,
            {"intermediate_size": (4 * tower["hidden_size"],), "layer_norm_eps": (EPS,), "num_channels": (3,)},
            source,
            odd,
        )
    ends = {"hidden_act": (vision["hidden_act"],), "eos_token_id": (LARGEST, end_token(text["vocab_size"]))}
    found.require_usual(text, ends, source, odd)
    size = vision["image_size"]
    found.require_usual(
        pixels,
        dict.fromkeys(STEPS, (True,))
        | {"resample": (BICUBIC,), "rescale_factor": (1 / 255,), "size": (size, {"shortest_edge": size})}
        | {"crop_size": (size, {"height": size, "width": size})},
        source,
        "its preprocessing has {name} = {value!r}; CLIP prepares images with {name} {known!r}. To use that anyway, "
        "change the file.",
    )
    image, texts = ({ours: towers[name][theirs] for theirs, ours in names.items()} for name, names in SETTINGS.items())
    colours = {name: colour for name in ("mean", "std") if (colour := pixels.get(f"image_{name}"))}
    model = {"name": Path(source).name, "embed_dim": values.get("projection_dim", 512), "image": image, "text": texts}
    return config_from_dict(model | colours | {"activation": vision["hidden_act"]}, source).named_as_preset()


def write_huggingface(config: ModelConfig, tensors: found.Tensors, folder: Path) -> None:
    """Write what ``CLIPModel``, ``CLIPProcessor`` and ``CLIPTokenizer`` read; a bias, which it has not, is left out."""
    from safetensors.torch import save_file

    from train_clip.data.tokenizer import merges

    if not isinstance(config.image, ViTConfig):
        raise UserError(
            f"{config.name}: its image tower is a ResNet, and Hugging Face's CLIPModel has vision transformers only. "
            "Write it --to open_clip or --to safetensors."
        )
    if config.logit_bias:
        warnings.warn(
            f"{config.name}: Hugging Face's CLIPModel has no logit_bias; {tensors['logit_bias'].item():.4f} is "
            "dropped. Rankings and softmax outputs do not change; add it before a sigmoid of the logits.",
            stacklevel=2,
        )
    save_file(rename_back(tensors), folder / sources.HF_WEIGHTS, metadata={"format": "pt"})
    for name, values in _settings(config).items():
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges()), ""]), encoding="utf-8")


def rename_back(tensors: found.Tensors) -> found.Tensors:
    """Our names and shapes → theirs."""
    renamed = {}
    projections, words = ({ours: theirs for theirs, ours in names.items()} for names in (PROJECTIONS, WORDS))
    for name, tensor in tensors.items():
        tower = "vision_model." if name.startswith("visual.") else "text_model."
        theirs = tower + _reworded(name.removeprefix("visual."), words)
        if name in projections:
            renamed[projections[name]] = tensor.T.contiguous()
        elif "in_proj_" in theirs:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[theirs.replace("in_proj_", f"{letter}_proj.")] = part
        elif name != "logit_bias":
            renamed[name if name == "logit_scale" else theirs] = tensor
    return renamed


def _settings(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files next to the weights, by name."""
    from train_clip.data.tokenizer import vocabulary

    size, last = config.image.size, end_token(config.text.vocab)
    of_all = {"projection_dim": config.embed_dim, "hidden_act": config.activation, "layer_norm_eps": EPS}
    towers: dict[str, Any] = {
        "vision_config": {"model_type": "clip_vision_model", "num_channels": 3},
        "text_config": {"model_type": "clip_text_model"}
        | {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": 1},
    }
    for (name, names), tower in zip(SETTINGS.items(), (config.image, config.text), strict=True):
        sizes = {theirs: getattr(tower, ours) for theirs, ours in names.items()}
        towers[name] |= sizes | {"intermediate_size": 4 * tower.width} | of_all
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    return {
        sources.HF_CONFIG: {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            **towers,
        },
        sources.HF_PIXELS: {
            **{"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "resample": BICUBIC},
            **dict.fromkeys((*STEPS, "do_convert_rgb"), True),
            **{"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}},
            **{"image_mean": list(config.mean), "image_std": list(config.std), "rescale_factor": 1 / 255},
        },
        "tokenizer_config.json": special
        | {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.context},
        "special_tokens_map.json": special,
        "vocab.json": {token: place for place, token in enumerate(vocabulary())},
    }
