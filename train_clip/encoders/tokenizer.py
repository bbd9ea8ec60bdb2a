"""Any tokenizer of the transformers library as this package wants it: cut, counted, padded to the batch's longest.

B  captions      L  tokens of the longest caption of the batch, at most the context
"""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train_clip.errors import UserError


@dataclass(frozen=True)
class PretrainedTokenizer:
    """Captions to the tensors that a pretrained text encoder takes.

    Args:
        tokenizer: of the transformers library; or any callable of its form, which is then asked for padded and
            truncated PyTorch tensors and cuts by a rule of its own.
        context_length: the most tokens of a caption, special ones included.

    Raises:
        ValueError: a context without room for a token beside the special ones.
    """

    tokenizer: Any
    context_length: int

    def __post_init__(self) -> None:
        least = 1 + (self.tokenizer.num_special_tokens_to_add() if _is_of_the_library(self.tokenizer) else 0)
        if self.context_length < least:
            raise ValueError(f"context_length: found {self.context_length}, expected at least {least}.")

    def __call__(self, texts: str | list[str]) -> dict[str, Tensor]:
        """Tokens of one caption or several, as ``batch`` gives them."""
        return self.batch([texts] if isinstance(texts, str) else texts)[0]

    def batch(self, texts: list[str]) -> tuple[dict[str, Tensor], int]:
        """Tokenize, cut what is longer than the context but for its special tokens, and pad on the right.

        A caption in which the tokenizer finds nothing becomes one token of padding that is not masked: attention over
        nothing has no value.

        Args:
            texts: B captions, at least one.

        Returns:
            (B, L) int64 tensors ``input_ids``, ``attention_mask`` and, of a tokenizer that has them,
            ``token_type_ids``; and how many captions were cut.
        """
        if not _is_of_the_library(self.tokenizer):
            return dict(self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")), 0
        rows = self._rows(texts)
        long = [place for place, ids in enumerate(rows["input_ids"]) if len(ids) > self.context_length]
        if long:
            cut = self._rows([texts[place] for place in long], truncation=True, max_length=self.context_length)
            for name, columns in rows.items():
                for place, column in zip(long, cut[name], strict=True):
                    columns[place] = column
        padding = self._padding()
        for place, ids in enumerate(rows["input_ids"]):
            if not ids:
                for name, columns in rows.items():
                    columns[place] = [1 if name == "attention_mask" else padding[name]]
        return {name: _pad(columns, padding[name]) for name, columns in rows.items()}, len(long)

    def describe(self) -> dict[str, Any] | None:
        """Give plain data for ``tokenizer_from``, with the whole vocabulary where the tokenizer is a fast one.

        Returns:
            What a checkpoint can hold; of a slow tokenizer its name alone; None of a callable of another kind.
        """
        tokenizer = self.tokenizer
        if not _is_of_the_library(tokenizer):
            return None
        described = {"source": "hf", "name": str(tokenizer.name_or_path), "context": self.context_length}
        if not tokenizer.is_fast:
            return described
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()  # of the last call
        backend.no_padding()
        return {
            **described,
            "backend": backend.to_str(),
            "special_tokens": {key: str(token) for key, token in tokenizer.special_tokens_map.items() if key in NAMED},
            "settings": {key: getattr(tokenizer, key) for key in SETTINGS},
        }

    def _rows(self, texts: list[str], **cut: Any) -> dict[str, list[list[int]]]:
        """Tokenize without padding: for each name B lists."""
        encoded = self.tokenizer(texts, return_attention_mask=True, verbose=False, **cut)
        return {name: encoded[name] for name in TENSORS if name in encoded}

    def _padding(self) -> dict[str, int]:
        """What fills each tensor. It is masked, so a tokenizer without padding (GPT-2) lends its end token."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        token = next(token for token in ids if token is not None)
        return {"input_ids": token, "attention_mask": 0, "token_type_ids": self.tokenizer.pad_token_type_id}


TENSORS = ("input_ids", "attention_mask", "token_type_ids")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = ("padding_side", "truncation_side", "model_input_names", "pad_token_type_id", "split_special_tokens")


def wrap_tokenizer(tokenizer: Any, context_length: int | None = None) -> PretrainedTokenizer:
    """Wrap a tokenizer of the user's own.

    Args:
        tokenizer: as for ``PretrainedTokenizer``.
        context_length: the text encoder's; the tokenizer's own where None, or 512 where that is no limit.
    """
    own = getattr(tokenizer, "model_max_length", DEFAULT_CONTEXT)
    own = own if own < UNLIMITED else DEFAULT_CONTEXT
    return PretrainedTokenizer(tokenizer, own if context_length is None else min(own, context_length))


DEFAULT_CONTEXT = 512  # of most text encoders
UNLIMITED = 10**6  # tokenizers without a limit say 10³⁰


def load_tokenizer(name: str, context_length: int) -> PretrainedTokenizer:
    """Load the tokenizer of a pretrained text encoder.

    Args:
        name: a hub name or a local folder.
        context_length: the encoder's; a tokenizer with a smaller one of its own keeps that.

    Raises:
        UserError: not reachable, not readable, or no tokenizer there.
    """
    transformers = _transformers()
    try:
        tokenizer = _read(transformers, name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if Path(name).is_dir():
            message = f"cannot load its tokenizer ({reason}). Put tokenizer.json and its companions into the folder."
        else:
            message = (
                f"its tokenizer is not in this machine's cache and not reachable ({reason}). Download it where there "
                f"is a network (`hf download {name} --local-dir FOLDER`) and give the folder: --text_encoder hf:FOLDER."
            )
        raise UserError(f"hf:{name}: {message}") from error
    return PretrainedTokenizer(tokenizer, min(context_length, tokenizer.model_max_length))


def tokenizer_from(description: dict[str, Any]) -> PretrainedTokenizer:
    """Rebuild the tokenizer that ``describe`` told of: equal ids for any text, without a network if it was a fast one.

    Raises:
        UserError: as ``load_tokenizer``, for a slow one.
    """
    context = description["context"]
    if "backend" not in description:
        return PretrainedTokenizer(load_tokenizer(description["name"], context).tokenizer, context)
    backend = importlib.import_module("tokenizers").Tokenizer.from_str(description["backend"])
    tokenizer = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=description["name"],
        **description["special_tokens"],
        **description["settings"],
    )
    return PretrainedTokenizer(tokenizer, context)


def _read(transformers: Any, name: str) -> Any:
    """Read from the cache first, as the weights are."""
    try:
        return _not_empty(transformers.AutoTokenizer.from_pretrained(name, local_files_only=True, **SAFE))
    except OSError:
        if Path(name).is_dir():
            raise
        return _not_empty(transformers.AutoTokenizer.from_pretrained(name, **SAFE))


SAFE = {"trust_remote_code": False}  # code that lies beside a tokenizer is not run


def _not_empty(tokenizer: Any) -> Any:
    """Refuse a tokenizer of special tokens alone: where its files are not, the library makes one without a word."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise OSError("there are no tokenizer files")
    return tokenizer


def _pad(rows: list[list[int]], value: int) -> Tensor:
    """Fill B rows up to the longest: (B, L) int64."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)


def _is_of_the_library(tokenizer: Any) -> bool:
    transformers = sys.modules.get("transformers")  # not imported, nothing can be of it
    return transformers is not None and isinstance(tokenizer, transformers.PreTrainedTokenizerBase)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"hf: tokenizers of this source need the package transformers ({error}). "
            "Install it: pip install 'train-clip[hf]'."
        ) from None
