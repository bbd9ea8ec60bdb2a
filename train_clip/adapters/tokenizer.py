"""A family's own tokenizer: its case, the length and the side of its padding, and whether it gives a mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
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
        tensors, num_cut = super().batch([text.lower() for text in texts] if self.lower_case else texts)
        names = self.tokenizer.model_input_names
        if not self.padded:
            return tensors, num_cut
        mask = tensors["attention_mask"].bool()
        room, left = self.context_length, self.tokenizer.padding_side == "left"
        # What is not read by the model's own pipeline is not masked either.
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0}

        def full(row: torch.Tensor, value: int) -> torch.Tensor:
            missing = room - len(row)
            return pad(row, (missing, 0) if left else (0, missing), value=value)

        return {
            name: torch.stack([full(row[of], value) for row, of in zip(tensors[name], mask, strict=True)])
            for name, value in fill.items()
            if name == "input_ids" or name in names
        }, num_cut


def tokenizer_for(model: AdaptedModel, told: Any) -> FamilyTokenizer:
    """Make the tokenizer of a model: of a folder or a name on the hub, or as a checkpoint describes it."""
    family, most = model.family, model.context_length
    assert most is not None
    found = described_tokenizer(told) if isinstance(told, Mapping) else load_tokenizer(str(told), most)
    known = model.vocab_size or 0
    if len(found.tokenizer) > known:
        raise UserError(
            f"{model.name}: its tokenizer has {len(found.tokenizer):,} tokens; the model knows {known:,}. Use the "
            "tokenizer of the model that the weights were trained from."
        )
    if found.tokenizer.padding_side != "right" and not family.padded:
        raise UserError(
            f"{model.name}: its tokenizer pads on the {found.tokenizer.padding_side}; {family.title} reads a caption "
            "from the first position. Expected padding_side right in tokenizer_config.json."
        )
    return FamilyTokenizer(found.tokenizer, found.context_length, family.padded, family.lower_case)
