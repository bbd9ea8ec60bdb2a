"""A tiny random model of each family with its own files, as a hub would hand them out; and photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.models.tiny_huggingface import randomize
from train_clip.adapters.families import FAMILIES

SIZE, CONTEXT = 32, 12
BLOCKS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = BLOCKS | {"image_size": SIZE, "patch_size": 8}
WORDS = ("picture", "the", "one", "numbered", "a", "photo", "of", "dog", "red", "house", *map(str, range(40)))
CAPTIONS = ["a photo of the red house", "picture 3", "dog", "the one numbered 11", "of " * 30]
EFFICIENTNET = {
    **{"image_size": SIZE, "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 4, "hidden_dim": 16},
    **{"kernel_sizes": [3, 3], "in_channels": [32, 8], "out_channels": [8, 12], "strides": [1, 2]},
    **{"num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [], "squeeze_expansion_ratio": 0.5},
    "drop_connect_rate": 0.0,
}


class Words(NamedTuple):
    """How a tokenizer frames words."""

    special: Sequence[str]  # in the order of their ids
    frame: str
    pad: str
    names: Sequence[str] = ("input_ids", "attention_mask")


SENTENCEPIECE = Words(("<pad>", "</s>", "<unk>"), "$A </s>", "<pad>", ("input_ids",))
XLM_ROBERTA = Words(("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>", "<pad>")
BERT = Words(("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]", "[PAD]", (*XLM_ROBERTA.names, "token_type_ids"))
FRAMES = {
    "siglip": SENTENCEPIECE,
    "metaclip_2": XLM_ROBERTA,
    "altclip": XLM_ROBERTA,
    "chinese_clip": BERT,
    "align": BERT,
}

CROPPED = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True}
COLOURS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_normalize": True}
PIXELS: dict[str, dict[str, Any]] = {
    "siglip": {"size": {"height": SIZE, "width": SIZE}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "metaclip_2": CROPPED | COLOURS | {"resample": 3},
    # As OFA-Sys/chinese-clip-vit-base-patch16: what is cropped is a square already.
    "chinese_clip": CROPPED | COLOURS | {"resample": 3, "size": {"height": SIZE, "width": SIZE}},
    "altclip": CROPPED | COLOURS | {"resample": 3},
    # As kakaobrain/align-base: x / 127.5 - 1.
    "align": {
        **{"size": {"height": 37, "width": 37}, "crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True},
        **{"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False},
        **{"resample": 2},
    },
}
HERE = [
    pytest.param(name, marks=pytest.mark.skipif(not hasattr(hf, family.model), reason=f"no {family.model}"))
    for name, family in FAMILIES.items()
]


def configured(name: str) -> Any:
    """The configuration of a tiny model."""
    words = FRAMES[name]
    of_words = {"vocab_size": len(words.special) + len(WORDS), "max_position_embeddings": CONTEXT}
    text = BLOCKS | of_words | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if name == "siglip":
        return hf.SiglipConfig(text_config=text, vision_config=VISION)
    if name == "metaclip_2":
        return hf.MetaClip2Config(text_config=text | ends, vision_config=VISION, projection_dim=8)
    if name == "chinese_clip":
        return hf.ChineseCLIPConfig(text_config=text | {"pad_token_id": 0}, vision_config=VISION, projection_dim=8)
    if name == "altclip":
        text |= ends | {"max_position_embeddings": CONTEXT + 2, "project_dim": 12}
        return hf.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return hf.AlignConfig(text_config=text | {"pad_token_id": 0}, vision_config=EFFICIENTNET, projection_dim=12)


def tokenizer(words: Words, **how: Any) -> hf.PreTrainedTokenizerFast:
    """One word, one token, capitals of their own being unknown."""
    vocabulary = {word: place for place, word in enumerate([*words.special, *WORDS])}
    unknown = next(word for word in words.special if "unk" in word.lower())
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(word, vocabulary[word]) for word in words.special if word in words.frame]
    backend.post_processor = processors.TemplateProcessing(single=words.frame, special_tokens=used)
    names = {"pad_token": words.pad, "unk_token": unknown, "eos_token": words.special[-2]}
    settings = {"model_max_length": CONTEXT, "model_input_names": list(words.names)}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names | settings | how)


def save(name: str, folder: Path, **pixels: Any) -> Any:
    """Write a tiny model's files into a folder; return the library's model, in eval mode."""
    torch.manual_seed(0)
    kind = getattr(hf, FAMILIES[name].model)
    model = kind(configured(name))
    randomize(model)
    with torch.no_grad():  # within what trained models have; SigLIP's are above what CLIP's may be
        for scale in (one for part, one in model.named_parameters() if part == "logit_scale"):
            scale.fill_(4.75 if name == "siglip" else 3.0)
        if name == "align":
            model.temperature.fill_(0.05)
    model.save_pretrained(folder)
    values = {"image_processor_type": FAMILIES[name].processor} | PIXELS[name] | pixels
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    tokenizer(FRAMES[name]).save_pretrained(folder)
    return model.eval()


def pipeline(model: Any, folder: Path, files: Sequence[Path], captions: list[str], context: int = CONTEXT) -> Any:
    """What transformers makes of pictures and captions by the files in a folder: pixels, and the model's output."""
    prepare, words = hf.AutoImageProcessor.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    pixels = prepare([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    padding = "max_length" if FAMILIES[model.config.model_type].padded else True
    tokens = words(captions, padding=padding, truncation=True, max_length=context, return_tensors="pt")
    with torch.no_grad():
        return pixels, model(pixel_values=pixels, **tokens)


def photographs(folder: Path) -> list[Path]:
    """Two photographs, and smooth pictures in several forms: wide, high, square, smaller than the models'."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = []
    for number, (width, height) in enumerate([(57, 41), (40, 83), (64, 64), (29, 26), (131, 67)]):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        files.append(folder / f"{number}.png")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(files[-1])
    for number, pixels in enumerate(load_sample_images().images):
        files.append(folder / f"photograph-{number}.jpg")
        Image.fromarray(pixels).save(files[-1])
    return files


def pairs(folder: Path, number: int = 12) -> Path:
    """Pictures of several forms with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number):
        rng = np.random.default_rng(place)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((36 + 3 * place, 60 - place), Image.Resampling.BICUBIC).save(folder / f"{place:03}.png")
        (folder / f"{place:03}.txt").write_text(f"the one numbered {place}\n")
    return folder
