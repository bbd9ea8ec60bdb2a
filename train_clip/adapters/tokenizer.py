"""A family's own tokenizer: its case, the length and the side of its padding, and whether it gives a mask."""

from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from train_clip.adapters.model import AdaptedModel
from train_clip.encoders.sources import described_tokenizer
from train_clip.encoders.tokenizer import PretrainedTokenizer, load_tokenizer
from train_clip.errors import UserError


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


def tokenizer_for(model: AdaptedModel, told: Any) -> FamilyTokenizer:
    """Make the tokenizer of a model: of a folder or a name on the hub, or as a checkpoint describes it."""
    family, most = model.family, model.context_length
    assert most is not None
    found = load_tokenizer(told, most) if isinstance(told, str) else described_tokenizer(told)
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
