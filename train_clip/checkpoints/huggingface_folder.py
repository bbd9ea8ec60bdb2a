"""A model → a folder that Hugging Face's ``CLIPModel``, ``CLIPProcessor`` and ``CLIPTokenizer`` read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from train_clip.checkpoints.found import Tensors
from train_clip.checkpoints.huggingface import BICUBIC, EPS, end_token, rename_back
from train_clip.checkpoints.read import HF_CONFIG, HF_PIXELS, HF_WEIGHTS
from train_clip.data.tokenizer import Tokenizer, merges, vocabulary
from train_clip.errors import UserError
from train_clip.files import write_text
from train_clip.models.config import ModelConfig, ResNetConfig


def write_huggingface(config: ModelConfig, state: Tensors, folder: Path) -> None:
    """Write a folder that ``CLIPModel``, ``CLIPProcessor`` and ``CLIPTokenizer`` read with ``from_pretrained``.

    Args:
        config: the model's.
        state: its tensors.
        folder: there already.

    Raises:
        UserError: a ResNet, which their CLIP does not have.

    Warns:
        UserWarning: it has a bias, which is left out.
    """
    if isinstance(config.image, ResNetConfig):
        raise UserError(
            f"{config.name}: its image tower is a ResNet, and Hugging Face's CLIPModel has vision transformers only. "
            "Write it --to open_clip or --to safetensors."
        )
    if config.logit_bias:
        warnings.warn(
            f"{config.name}: Hugging Face's CLIPModel has no logit_bias; {state['logit_bias'].item():.4f} is left out. "
            "Rankings and softmaxes stay as they are; before a sigmoid of its logits add it.",
            stacklevel=2,
        )
        state = {name: tensor for name, tensor in state.items() if name != "logit_bias"}
    tensors = {name: tensor.contiguous() for name, tensor in rename_back(state).items()}
    save_file(tensors, folder / HF_WEIGHTS, metadata={"format": "pt"})
    for name, values in _settings(config).items():
        write_text(folder / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")


def _settings(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The files beside the weights, by name."""
    image, text = config.image, config.text
    assert not isinstance(image, ResNetConfig)
    last = end_token(text.vocab)
    towers = {
        "vision_config": {
            **_sizes(image.width, image.layers, image.heads, config, "clip_vision_model"),
            **{"image_size": image.size, "patch_size": image.patch, "num_channels": 3},
        },
        "text_config": {
            **_sizes(text.width, text.layers, text.heads, config, "clip_text_model"),
            **{"max_position_embeddings": text.context, "vocab_size": text.vocab},
            **{"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": 1},
        },
    }
    start, end = (vocabulary()[token] for token in (Tokenizer.start_token, Tokenizer.end_token))
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return {
        HF_CONFIG: {
            **{"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim},
            **towers,
        },
        HF_PIXELS: {
            **{"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "resample": BICUBIC},
            **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
            **{"size": {"shortest_edge": image.size}, "crop_size": {"height": image.size, "width": image.size}},
            **{"image_mean": list(config.mean), "image_std": list(config.std), "rescale_factor": 1 / 255},
        },
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context, **special},
        "special_tokens_map.json": special,
        "vocab.json": {token: place for place, token in enumerate(vocabulary())},
    }


def _sizes(width: int, layers: int, heads: int, config: ModelConfig, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": config.embed_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": EPS,
    }
