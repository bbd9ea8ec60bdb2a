"""Tiny Hugging Face encoders, saved as a hub would hand them out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ResNetConfig, ResNetModel

WORDS = ("picture", "the", "one", "numbered", *map(str, range(40)))


def save_resnet(folder: Path, size: int = 16, width: int = 24) -> Path:
    """A ResNet of two stages for images of ``size`` pixels."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, width], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    pixels = {"size": {"shortest_edge": size}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    Path(folder, "preprocessor_config.json").write_text(json.dumps(pixels | {"do_normalize": True}))
    return folder


def save_bert(folder: Path, width: int = 16) -> Path:
    """A BERT of two layers with a vocabulary of a few words, 32 positions, and dropout as it comes."""
    torch.manual_seed(1)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **names).save_pretrained(folder)
    return folder
