"""Encoders of a few hundred numbers, their captions and pictures: made on the spot, with no network.

B  pairs      L  tokens
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WIDTH, SIDE, CONTEXT, VOCAB = 16, 8, 32, 60


class ImageTower(nn.Module):
    """A convolution, a norm and a linear layer: (B, 3, 8, 8) → (B, 16)."""

    def __init__(self, width: int = WIDTH, norm: str = "layer") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm: nn.Module = nn.BatchNorm2d(8) if norm == "batch" else nn.LayerNorm([8, 2, 2])
        self.fc = nn.Linear(32, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).flatten(1).tanh())


def image_tower(width: int = WIDTH, norm: str = "layer") -> ImageTower:
    torch.manual_seed(1)
    return ImageTower(width, norm)


def bert(dropout: float = 0.0, **how: Any) -> transformers.BertModel:
    """A BERT of two layers."""
    torch.manual_seed(2)
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertModel(config, **how)


def vit() -> transformers.ViTModel:
    """A ViT of one layer for images of 8 pixels."""
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=4,
    )
    return transformers.ViTModel(config)


def tokenizer(context: int = CONTEXT) -> transformers.PreTrainedTokenizerFast:
    """Words "w0" to "w49" and BERT's special tokens."""
    import tokenizers

    words = {name: place for place, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    words |= {f"w{number}": len(words) + number for number in range(50)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=context, **names)


def pixels(number: int, seed: int = 4) -> Tensor:
    """Images, (number, 3, 8, 8) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def captions(number: int, seed: int = 5, longest: int = 9) -> dict[str, Tensor]:
    """Captions of different lengths, padded: ``input_ids`` and ``attention_mask``, (number, longest) int64."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 54, (number, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (number, 1), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


class Pairs(Dataset[Any]):
    """Pairs in memory: images, and a tokenizer's mapping."""

    def __init__(self, images: Tensor, texts: dict[str, Tensor]) -> None:
        self.images, self.texts = images, texts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[place], {name: rows[place] for name, rows in self.texts.items()}


def loader(number: int, batch_size: int, seed: int = 0) -> DataLoader[Any]:
    """Batches in the order of the pairs."""
    return DataLoader(Pairs(pixels(number, 4 + seed), captions(number, 5 + seed)), batch_size)


def bare_trainer(**how: Any) -> L.Trainer:
    """A Trainer that leaves nothing behind by itself."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", **({"max_epochs": 1} | quiet | how))


def save_text_model(folder: Path) -> Path:
    """A text model and its tokenizer, as ``from_pretrained`` reads them."""
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
