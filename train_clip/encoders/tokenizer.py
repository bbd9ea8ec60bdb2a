"""Any tokenizer of the transformers library as this package wants it: cut, counted, padded to the batch's longest.

B  captions      L  tokens of the longest caption of the batch, at most the context
"""

import sys
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch

from train_clip.encoders.huggingface import DEFAULT_CONTEXT, from_cache_first, reading
from train_clip.encoders.libraries import find_library

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = ("padding_side", "truncation_side", "model_input_names", "pad_token_type_id", "split_special_tokens")
UNLIMITED = 10**6  # tokenizers without a limit say 10³⁰


@dataclass(frozen=True)
class PretrainedTokenizer:
    """Captions to the tensors that a pretrained text encoder takes.

    A callable of that form that is not the library's is asked for padded and truncated PyTorch tensors.
    """

    tokenizer: Any
    context_length: int  # the most tokens of a caption, special ones included

    def __post_init__(self) -> None:
        special = self.tokenizer.num_special_tokens_to_add() if _is_pretrained(self.tokenizer) else 0
        if self.context_length <= special:
            raise ValueError(f"context_length: found {self.context_length}, expected at least {special + 1}.")

    def __call__(self, texts: str | list[str]) -> dict[str, torch.Tensor]:
        """Tokens of one caption or several, as ``batch`` gives them."""
        return self.batch([texts] if isinstance(texts, str) else texts)[0]

    def batch(self, texts: list[str]) -> tuple[dict[str, torch.Tensor], int]:
        """Tokenize, cut what is longer than the context but for its special tokens, and pad on the right.

        A caption in which the tokenizer finds nothing becomes one token of padding that is not masked: attention over
        nothing has no value.

        Returns:
            (B, L) int64 tensors ``input_ids``, ``attention_mask`` and, of a tokenizer that has them,
            ``token_type_ids``; and how many captions were cut.
        """
        if not _is_pretrained(self.tokenizer):
            return dict(self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")), 0
        plain = {"return_attention_mask": True, "verbose": False}
        rows, most = self.tokenizer(texts, **plain), self.context_length
        long = [place for place, ids in enumerate(rows["input_ids"]) if len(ids) > most]
        cut = self.tokenizer([texts[i] for i in long], truncation=True, max_length=most, **plain) if long else {}
        # Padding is masked, so a tokenizer without it (GPT-2) lends its end token.
        ends = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        fill = next(token for token in ends if token is not None)
        padding = {"input_ids": fill, "attention_mask": 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        tensors = {}
        for name, value in padding.items():
            if name not in rows:
                continue
            for place, column in zip(long, cut.get(name, ()), strict=True):
                rows[name][place] = column
            blank = [1 if name == "attention_mask" else value]
            each = [torch.tensor(column or blank, dtype=torch.int64) for column in rows[name]]
            tensors[name] = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=value)
        return tensors, len(long)

    def describe(self) -> dict[str, Any] | None:
        """Give plain data for ``tokenizer_from``, of a fast tokenizer with the whole vocabulary, of a slow one by name.

        None of a callable that is not of the library.
        """
        tokenizer = self.tokenizer
        if not _is_pretrained(tokenizer):
            return None
        described = {"source": "hf", "name": str(tokenizer.name_or_path), "context": self.context_length}
        if not tokenizer.is_fast:
            return described
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()  # of the last call
        backend.no_padding()
        return {
            **described,
            "backend": backend.to_str(),
            "special_tokens": {key: str(token) for key, token in tokenizer.special_tokens_map.items() if key in NAMED},
            "settings": {key: getattr(tokenizer, key) for key in SETTINGS},
        }


def _is_pretrained(tokenizer: Any) -> bool:
    """Whether it is of the library, which is not imported to find out."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(tokenizer, library.PreTrainedTokenizerBase)


def wrap_tokenizer(tokenizer: Any, context_length: int | None = None) -> PretrainedTokenizer:
    """Wrap a tokenizer of the user's own, which keeps a smaller context of its own, or 512 where it has none."""
    own = getattr(tokenizer, "model_max_length", UNLIMITED)
    own = own if own < UNLIMITED else DEFAULT_CONTEXT
    return PretrainedTokenizer(tokenizer, min(own, context_length or own))


def load_tokenizer(name: str, context_length: int) -> PretrainedTokenizer:
    """Load a text encoder's tokenizer by its hub name or folder; one with a smaller context of its own keeps that."""
    auto = find_library("transformers").AutoTokenizer

    def read(name: str, **how: Any) -> Any:
        tokenizer = auto.from_pretrained(name, **how)
        # Where the files are not, the library makes a tokenizer of special tokens alone without a word.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise OSError("found no tokenizer.json or related files")
        return tokenizer

    with reading(name, "tokenizer"):
        tokenizer = from_cache_first(read, name)
    return PretrainedTokenizer(tokenizer, min(context_length, tokenizer.model_max_length))


def tokenizer_from(description: dict[str, Any]) -> PretrainedTokenizer:
    """Rebuild the tokenizer that ``describe`` told of: equal ids for any text, of a fast one without a network."""
    context = description["context"]
    if "backend" not in description:
        return PretrainedTokenizer(load_tokenizer(description["name"], context).tokenizer, context)
    tokenizer = find_library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(description["backend"]),
        name_or_path=description["name"],
        **description["special_tokens"],
        **description["settings"],
    )
    return PretrainedTokenizer(tokenizer, context)
