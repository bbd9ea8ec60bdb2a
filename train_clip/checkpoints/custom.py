"""The arguments of a ``CustomCLIPWrapper`` → its two encoders joined, and the tokenizer, without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train_clip.checkpoints.encoders import build_image_encoder, build_text_encoder
from train_clip.data.pretrained_tokenizer import PretrainedTokenizer, tokenizer_from
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.models.custom import CustomCLIP


def build_custom(arguments: Mapping[str, Any]) -> tuple[CustomCLIP, Tokenizer | PretrainedTokenizer]:
    """Build the model that a checkpoint tells of, with random weights.

    Args:
        arguments: what its module was made with, plain data.

    Raises:
        UserError: an encoder or a tokenizer of the user's own, which the checkpoint does not say how to make.
    """
    for name in ("image_encoder", "text_encoder", "tokenizer"):
        if not isinstance(arguments.get(name), Mapping):
            raise UserError(
                f"The checkpoint does not say how to make its {name}, which was one of your own. Make it, and load "
                f"with CustomCLIPWrapper.load_from_checkpoint(PATH, {name}=…)."
            )
    image, text = (
        build_image_encoder(dict(arguments["image_encoder"])),
        build_text_encoder(dict(arguments["text_encoder"])),
    )
    model = CustomCLIP(image, text, arguments["avg_word_embs"], arguments["project"])
    if arguments.get("loss") == "sigmoid":
        model.add_bias()
    return model, described_tokenizer(arguments["tokenizer"])


def described_tokenizer(description: Mapping[str, Any]) -> Tokenizer | PretrainedTokenizer:
    """Make the tokenizer that a checkpoint describes."""
    if description["source"] == "clip":
        return Tokenizer(description["context_length"])
    return tokenizer_from(dict(description))
