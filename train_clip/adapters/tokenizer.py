"""A family's own tokenizer: its case, the length and the side of its padding, and whether it gives a mask."""

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from typing_extensions import override

from train_clip.adapters.model import AdaptedModel
from train_clip.encoders.huggingface import reading
from train_clip.encoders.sources import described_tokenizer
from train_clip.encoders.tokenizer import PretrainedTokenizer, load_tokenizer
from train_clip.errors import UserError

SLOW = {"source": "files"}


@dataclass(frozen=True)
class FamilyTokenizer(PretrainedTokenizer):
    """Captions to the tensors that a family's text tower takes."""

    padded: bool  # to the context length, on the tokenizer's own side
    lower_case: bool

    @override
    def batch(self, texts: list[str]) -> tuple[dict[str, torch.Tensor], int]:
        texts = [text.lower() for text in texts] if self.lower_case else texts
        if not self.padded or not texts:
            return super().batch(texts)
        how: Any = {"padding": "max_length", "truncation": True, "max_length": self.context_length}
        found = self.tokenizer(texts, return_attention_mask=True, return_tensors="pt", verbose=False, **how)
        filled = [text for text, mask in zip(texts, found["attention_mask"], strict=True) if mask.all()]
        # Without a mask, as the model was trained, where its files ask for none.
        tensors = {name: found[name] for name in self.tokenizer.model_input_names if name in found}
        return tensors, super().batch(filled)[1] if filled else 0

    @override
    def describe(self) -> dict[str, Any] | None:
        if self.tokenizer.is_fast:
            return super().describe()
        with TemporaryDirectory() as place:  # of SentencePiece: its files, which are small
            self.tokenizer.save_pretrained(place)
            return {file.name: b64encode(file.read_bytes()).decode() for file in Path(place).iterdir()} | SLOW


def tokenizer_for(model: AdaptedModel, told: Any) -> FamilyTokenizer:
    """Make the tokenizer of a model: of a folder or a name on the hub, or as a checkpoint describes it."""
    family, most = model.family, model.context_length
    assert most is not None
    with reading(model.name, "tokenizer"):
        found = load_tokenizer(told, most) if isinstance(told, str) else _described(told, most)
    own, known = found.tokenizer, model.vocab_size or 0
    if len(own) > known:
        raise UserError(
            f"{model.name}: its tokenizer has {len(own):,} tokens; the model knows {known:,}. Use the tokenizer of the "
            "model that the weights were trained from."
        )
    if own.padding_side != "right" and not family.padded:
        raise UserError(
            f"{model.name}: its tokenizer pads on the {own.padding_side}; {family.title} reads a caption from the "
            "first position. Expected padding_side right in tokenizer_config.json."
        )
    return FamilyTokenizer(own, found.context_length, family.padded, family.lower_case)


def _described(told: Any, most: int) -> PretrainedTokenizer:
    if not isinstance(told, Mapping) or told.get("source") != SLOW["source"]:
        return described_tokenizer(told)
    place = TemporaryDirectory()
    for name in told.keys() - SLOW:
        Path(place.name, Path(name).name).write_bytes(b64decode(told[name]))
    found = load_tokenizer(place.name, most)
    found.tokenizer.place = place  # there as long as the tokenizer: a loader's processes may read them again
    return found
