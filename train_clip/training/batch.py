"""A loader's batch → the model's images and tokens, or a message that says what is wrong with them.

B  pairs on this process      L  tokens of the longest caption      S  side of the image in pixels
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from train_clip.errors import UserError
from train_clip.models.clip import CLIP, DualEncoder, Texts, texts_on

LARGEST_NORMALISED = 5.0  # normalized pixels lie within ±2.7; twice that is no rounding


class Inputs(NamedTuple):
    """What the model takes of a batch, on the device but for the lengths."""

    images: Tensor  # (B, 3, S, S) uint8, or float that is already normalized
    texts: Texts  # tokens
    lengths: Tensor  # (B,) int64 tokens of each caption, on the host: what comes after them is padding
    captions: Tensor  # (B,) int64, equal for equal captions


class BatchReader:
    """Reads batches of any accepted kind for a model."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self.padding_counts = False  # whether the text tower makes something else of a caption that is padded
        self._checked_values = False
        self._lengths: Tensor | None = None

    def measure(self, batch: Any) -> None:
        """Note the lengths of the captions of the batch that is read next while it is on the host."""
        texts: Any = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else {}
        named = _named(texts)
        ids: Any = named.get("input_ids")
        sound = all(isinstance(one, Tensor) and one.numel() for one in (ids, *named.values()))
        self._lengths = self.lengths(texts) if sound and ids.ndim == 2 and ids.dtype != torch.bool else None

    def lengths(self, texts: Texts) -> Tensor:
        """Tokens of each caption up to where nothing but padding comes, (B,) int64 on the host."""
        mask = self.model.caption_mask(texts)
        if self.padding_counts or any(one.ndim > 1 and one.shape != mask.shape for one in _named(texts).values()):
            # Of a mask of pairs, for instance, it is not known what padding is to it.
            return torch.full((len(mask),), mask.shape[1])
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return (mask * places).amax(dim=1).clamp(min=1).cpu()

    def read(self, batch: Any, device: torch.device, tokenizer: Any = None) -> Inputs:
        """Images and tokens on a device, of a batch that starts with images and with tokens, a mapping or strings."""
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise UserError(
                f"A batch is a {type(batch).__name__}; expected a tuple or list that starts with images and texts. "
                "Give the loader a collate_fn that returns (images, texts)."
            )
        images = batch[0]
        if not isinstance(images, Tensor) or (images.ndim != 4 and getattr(batch[1], "ndim", 0) == 4):
            found = f"Tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            size = self.model.image_size
            raise UserError(
                f"A batch starts with a {found}; {self.model.name} expects a tensor of images (B, 3, {size}, {size}), "
                "then the texts. Give the loader a collate_fn that returns (images, texts)."
            )
        texts = self.tokens(batch[1], device, tokenizer)
        ids = _named(texts)["input_ids"]
        _check_shapes(images, ids, self.model)
        if not self._checked_values:
            self._checked_values = True
            _check_values(images, ids, self.model)
        lengths, self._lengths = self._lengths, None
        captions = self.model.caption_ids(texts)
        return Inputs(images.to(device), texts, self.lengths(texts) if lengths is None else lengths, captions)

    def tokens(self, texts: Any, device: torch.device, tokenizer: Any) -> Texts:
        """Tokens in the form that the model takes, on a device, of tokens, a tokenizer's mapping or strings."""
        if not isinstance(texts, Mapping | Tensor):
            texts = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
            if odd := [text for text in texts if not isinstance(text, str)]:
                raise UserError(
                    f"The texts of a batch hold a {type(odd[0]).__name__}; expected a string for each image, a tensor "
                    "of tokens (B, L), or what a tokenizer returns. Of several captions choose one, in the data set or "
                    "the loader's collate_fn."
                )
            if tokenizer is None:
                raise UserError(
                    "The texts are strings, and the module has no tokenizer. Give it one (tokenizer=…), or give the "
                    "data module one (custom_tokenizer=…)."
                )
            texts = tokenizer.batch(texts)[0]
        named = _named(texts)
        if "input_ids" not in named or not all(isinstance(one, Tensor) for one in named.values()):
            found = ", ".join(f"{name} ({type(value).__name__})" for name, value in named.items())
            raise UserError(
                f"The texts of a batch hold {found}; expected tensors, input_ids among them. Request them from "
                'the tokenizer: return_tensors="pt", padding=True.'
            )
        return texts_on(device, texts)


def _named(texts: Any) -> Mapping[str, Any]:
    return texts if isinstance(texts, Mapping) else {"input_ids": texts}


def _check_shapes(images: Tensor, ids: Tensor, model: DualEncoder) -> None:
    size, context = model.image_size, model.context_length
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise UserError(
            f"A batch's images have shape {tuple(images.shape)}; {model.name} expects (B, 3, {size}, {size}). "
            f"Resize them, as TextImageDataModule(…, image_size={size}) does, or build the model for their size."
        )
    is_whole = model.vocab_size is None or ids.dtype in (torch.int64, torch.int32)
    if not is_whole or ids.ndim != 2 or len(ids) != len(images) or (context is not None and ids.shape[1] > context):
        at_most = "" if context is None else f", of {context} tokens at most"
        advice = (
            "Cut longer captions, keeping their end token: TextImageDataModule(…, context_length=…), or in your loader"
        )
        if not is_whole:
            advice = "Convert them in your loader: tokens.long()"
        elif ids.ndim == 3:
            advice = "A tokenizer that is called for each caption returns a batch of one: take its row, tokens[0]"
        raise UserError(
            f"A batch's tokens have shape {tuple(ids.shape)}, {ids.dtype}, beside {len(images)} images; {model.name} "
            f"expects whole numbers, torch.int64, one row per image{at_most}. {advice}."
        )


def _check_values(images: Tensor, ids: Tensor, model: DualEncoder) -> None:
    # Of the first batch alone: it waits for the device.
    least, most, vocab = int(ids.min()), int(ids.max()), model.vocab_size
    if least < 0 or (vocab is not None and most >= vocab):
        known = "any" if vocab is None else f"{vocab:,}"
        raise UserError(
            f"Token ids run from {least} to {most}; {model.name} has a vocabulary of {known}. Use the tokenizer that "
            "belongs to it, or batches of plain strings."
        )
    if isinstance(model, CLIP) and len(ids.amax(dim=1).unique()) > 1:
        raise UserError(
            f"The largest token differs between captions, but {model.name} reads its text feature "
            "at the end token, the largest of CLIP's tokens. Use CLIP's tokenizer, or batches of plain strings."
        )
    if images.is_floating_point() and (images.min() >= 0 or images.abs().max() > LARGEST_NORMALISED):
        rank_zero_warn(
            f"The first batch's images are floating point from {images.min():.3g} to {images.max():.3g}. Floats are "
            "treated as already normalized with mean and standard deviation, and these do not look normalized. Pass "
            "uint8 to have them normalized."
        )
