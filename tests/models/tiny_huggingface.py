"""Models of the transformers library of a few thousand numbers, made and saved on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIDE, CONTEXT, VOCAB = 32, 20, 99
BLOCKS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**BLOCKS, "image_size": SIDE, "patch_size": 8}
TEXT = {**BLOCKS, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
TEXT_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STAGES = {"hidden_sizes": [4, 8, 8, 12], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": SIDE, "patch_size": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT, "vocab_size": VOCAB}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB}
DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": CONTEXT}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def clip() -> hf.CLIPModel:
    return hf.CLIPModel(hf.CLIPConfig(text_config={**TEXT, **TEXT_ENDS}, vision_config=VISION, projection_dim=8))


def siglip() -> hf.SiglipModel:
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))


# What is saved, and the feature by hand from it and images (B, 3, S, S).
IMAGE_MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "resnet": (
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=4, layer_type="basic", **STAGES)),
        lambda model, images: model(images).last_hidden_state.mean(dim=(2, 3)),
    ),
    "resnet with a classifier": (
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=4, layer_type="basic", **STAGES)),
        lambda model, images: model.resnet(images).last_hidden_state.mean(dim=(2, 3)),
    ),
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
        lambda model, images: model.pooler.dense(model(images).last_hidden_state[:, 0]).tanh(),
    ),
    "vit without pooler": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        lambda model, images: model.vit(images).last_hidden_state[:, 0],
    ),
    "dinov2": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)),
        lambda model, images: model(images).last_hidden_state[:, 0],
    ),
    "clip": (
        clip,
        lambda model, images: model.vision_model(images).pooler_output,
    ),
    "siglip": (
        siglip,
        lambda model, images: model.vision_model(images).pooler_output,
    ),
    "convnext": (
        lambda: hf.ConvNextModel(hf.ConvNextConfig(**STAGES)),
        lambda model, images: model.layernorm(model.encoder(model.embeddings(images))[0].mean(dim=(2, 3))),
    ),
    "swin": (
        lambda: hf.SwinModel(hf.SwinConfig(**SWIN)),
        lambda model, images: model(images).last_hidden_state.mean(dim=1),
    ),
}
# What is saved, its part that encodes text, the context, and whether it has a pooled feature.
TEXT_MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], int, bool]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**TEXT)), lambda model: model, CONTEXT, True),
    "bert without pooler": (lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), lambda m: m.bert, CONTEXT, False),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)), lambda model: model, CONTEXT - 2, True),
    "mpnet": (lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)), lambda model: model, CONTEXT - 2, True),
    "distilbert": (
        lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=VOCAB, **DISTIL)),
        lambda model: model,
        CONTEXT,
        False,
    ),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), lambda model: model.transformer, CONTEXT, False),
    "t5": (lambda: hf.T5Model(hf.T5Config(**T5)), lambda model: model.encoder, 512, False),
    "t5 encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), lambda model: model, 512, False),
    "clip": (clip, lambda model: model.text_model, CONTEXT, True),
    "siglip": (siglip, lambda model: model.text_model, CONTEXT, True),
}


def randomize(model: nn.Module) -> None:
    """Move every parameter away from where it was initialised; gains of 0 and biases of 0 would hide a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def saved(build: Callable[[], Any], folder: Path, preprocessor: dict[str, Any] | None = None) -> Any:
    """A model in eval mode that lies in the folder, too."""
    model = build().eval()
    randomize(model)
    model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model
