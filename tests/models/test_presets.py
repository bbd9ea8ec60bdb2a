"""The presets against the CLIP paper's tables 18 to 20 and the sizes of OpenAI's published models.

The counts of parameters are those of the weights that OpenAI published: image tower, text tower, and one temperature.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, ResNetConfig, ViTConfig, config_from_dict, presets, read_config

RESNET_ADAM = ((0.9, 0.999), 1e-8)
VIT_ADAM = ((0.9, 0.98), 1e-6)

# name, parameters (image, text, with the temperature), lr, epochs, embed, pixels, vision sizes, text width and heads
PAPER = [
    ("RN50", 38_316_896, 63_690_240, 102_007_137, 5e-4, 32, 1024, 224, ((3, 4, 6, 3), 64), (512, 8)),
    ("RN101", 56_259_936, 63_428_096, 119_688_033, 5e-4, 32, 512, 224, ((3, 4, 23, 3), 64), (512, 8)),
    ("RN50x4", 87_137_080, 91_163_520, 178_300_601, 5e-4, 32, 640, 288, ((4, 6, 10, 6), 80), (640, 10)),
    ("RN50x16", 167_328_912, 123_650_304, 290_979_217, 4e-4, 32, 768, 384, ((6, 8, 18, 8), 96), (768, 12)),
    ("RN50x64", 420_380_352, 202_877_952, 623_258_305, 3.6e-4, 32, 1024, 448, ((3, 15, 36, 10), 128), (1024, 16)),
    ("ViT-B/32", 87_849_216, 63_428_096, 151_277_313, 5e-4, 32, 512, 224, (12, 768, 12, 32), (512, 8)),
    ("ViT-B/16", 86_192_640, 63_428_096, 149_620_737, 5e-4, 32, 512, 224, (12, 768, 12, 16), (512, 8)),
    ("ViT-L/14", 303_966_208, 123_650_304, 427_616_513, 4e-4, 32, 768, 224, (24, 1024, 16, 14), (768, 12)),
    ("ViT-L/14-336px", 304_293_888, 123_650_304, 427_944_193, 2e-5, 1, 768, 336, (24, 1024, 16, 14), (768, 12)),
]
by_name = pytest.mark.parametrize("row", PAPER, ids=[row[0] for row in PAPER])


def count(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the image tower, and of the whole."""
    with torch.device("meta"):
        model = CLIP(config)
    return sum(p.numel() for p in model.visual.parameters()), sum(p.numel() for p in model.parameters())


@by_name
def test_parameters(row):
    """Both towers' parameters, to the last one, against OpenAI's weights."""
    name, image, text, total = row[:4]
    assert image + text + 1 == total
    assert count(read_config(name)) == (image, total)


@by_name
def test_sizes(row):
    """Sizes that no count of parameters shows, heads among them, against tables 19 and 20."""
    name, embed_dim, size, vision, (text_width, text_heads) = row[0], *row[6:]
    config = read_config(name)
    assert (config.name, config.embed_dim, config.image.size) == (name, embed_dim, size)
    assert config.activation == "quick_gelu"
    text = config.text
    assert (text.context, text.vocab, text.layers, text.width, text.heads) == (77, 49_408, 12, text_width, text_heads)
    if name.startswith("RN"):
        assert isinstance(config.image, ResNetConfig)
        assert (config.image.blocks, config.image.width) == vision
        with torch.device("meta"):
            assert CLIP(config).visual.attnpool.heads == config.image.width * 32 // 64
    else:
        assert isinstance(config.image, ViTConfig)
        image = config.image
        assert (image.layers, image.width, image.heads, image.patch) == vision


@by_name
def test_optimizer_numbers(row):
    """Rate, Adam's numbers, decay, warm-up and length against tables 18 to 20."""
    name, learning_rate, epochs = row[0], row[4], row[5]
    optimizer = read_config(name).optimizer
    assert (optimizer.lr, optimizer.epochs) == (learning_rate, epochs)
    assert (optimizer.betas, optimizer.eps) == (RESNET_ADAM if name.startswith("RN") else VIT_ADAM)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (0.2, 2_000)


def test_large_16():
    """ViT-L/16 against ViT-L/14: 1,024 filters of 3·16² for 3·14², and 196 places for 256."""
    image, total = count(read_config("ViT-L/16"))
    more = 1024 * 3 * (16**2 - 14**2) - 1024 * (256 - 196)
    assert (image, total) == (303_966_208 + more, 427_616_513 + more)
    assert dataclasses.replace(read_config("ViT-L/16").image, patch=14) == read_config("ViT-L/14").image


def test_every_preset_is_its_own_file():
    """Each preset, written as YAML and read back, is the same; names are unique."""
    names = [config.name for config in presets()]
    assert len(set(names)) == len(names) >= len(PAPER)
    for config in presets():
        assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14-336px"])
def test_a_name_that_is_also_a_file_name(name):
    """``ViT-B-32`` finds what ``ViT-B/32`` finds."""
    assert read_config(name.replace("/", "-")) is read_config(name)
