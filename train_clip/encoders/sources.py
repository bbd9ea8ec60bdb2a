"""The arguments of a ``CustomCLIPWrapper`` → its two encoders joined, and the tokenizer, without a network.

Pretrained encoders by their source: a prefix that names a library, then the library's own name for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders import huggingface, libraries
from train_clip.encoders import own as own_encoders
from train_clip.encoders.custom import CustomCLIP
from train_clip.encoders.encoder import ImageEncoder, TextEncoder
from train_clip.encoders.tokenizer import PretrainedTokenizer, tokenizer_from
from train_clip.errors import UserError


class Source(NamedTuple):
    """What one prefix can do.

    Args:
        image_example: a source of an image encoder, for messages.
        load_image: from a name, with pretrained weights.
        build_image: from a description, with random weights and without a network.
        text_example: as the image's; empty where the library has no text encoders.
        load_text: as the image's; None where the library has no text encoders.
        build_text: as the image's.
    """

    image_example: str
    load_image: Callable[[str], ImageEncoder]
    build_image: Callable[[dict[str, Any]], ImageEncoder]
    text_example: str = ""
    load_text: Callable[[str], TextEncoder] | None = None
    build_text: Callable[[dict[str, Any]], TextEncoder] | None = None


SOURCES = {
    "hf": Source(
        "hf:facebook/dinov2-small",
        huggingface.load_image,
        huggingface.build_image,
        "hf:sentence-transformers/all-mpnet-base-v2",
        huggingface.load_text,
        huggingface.build_text,
    ),
    "timm": Source("timm:resnet50", libraries.load_timm, libraries.build_timm),
    own_encoders.SOURCE: Source(
        "train-clip:RUN/checkpoints/last.ckpt",
        own_encoders.load_image,
        own_encoders.build_image,
        "train-clip:RUN/checkpoints/last.ckpt",
        own_encoders.load_text,
        own_encoders.build_text,
    ),
    "torchvision": Source("torchvision:resnet50", libraries.load_torchvision, libraries.build_torchvision),
}


def load_image_encoder(source: str) -> ImageEncoder:
    """Load a pretrained image encoder.

    Args:
        source: such as "hf:facebook/dinov2-small", "hf:FOLDER", "timm:resnet50" or "torchvision:resnet50".

    Raises:
        UserError: an unknown prefix, or what the library cannot load.
    """
    prefix, name = _split(source, "image")
    return SOURCES[prefix].load_image(name)


def load_text_encoder(source: str) -> TextEncoder:
    """Load a pretrained text encoder.

    Args:
        source: such as "hf:sentence-transformers/all-mpnet-base-v2" or "hf:FOLDER".

    Raises:
        UserError: an unknown prefix, a library without text encoders, or what the library cannot load.
    """
    prefix, name = _split(source, "text")
    load = SOURCES[prefix].load_text
    if load is None:
        raise UserError(f"--text_encoder {source}: {prefix} has no text encoders. Expected {_examples('text')}.")
    return load(name)


def build_image_encoder(description: dict[str, Any]) -> ImageEncoder:
    """Build the image encoder that an ``ImageEncoder.description`` tells of, with random weights, without a network.

    Raises:
        UserError: a description of no known source, or a library that is missing or too old.
    """
    return SOURCES[_source_of(description)].build_image(description)


def build_text_encoder(description: dict[str, Any]) -> TextEncoder:
    """Build the text encoder that a ``TextEncoder.description`` tells of, with random weights, without a network.

    Raises:
        UserError: as ``build_image_encoder``.
    """
    build = SOURCES[_source_of(description)].build_text
    if build is None:
        raise UserError(f"A text encoder of source {description['source']!r}; expected {_examples('text')}.")
    return build(description)


def _split(source: str, kind: str) -> tuple[str, str]:
    """Part "hf:NAME" into its two; a name may hold further colons."""
    prefix, colon, name = source.partition(":")
    if colon and name and prefix in SOURCES:
        return prefix, name
    if source and Path(source).exists():
        library = "hf" if Path(source).is_dir() else own_encoders.SOURCE
        raise UserError(f"--{kind}_encoder {source}: a path without its library. Write {library}:{source}.")
    what = f"unknown prefix {prefix!r}" if colon and prefix not in SOURCES else "no library and name"
    raise UserError(f"--{kind}_encoder {source}: {what}. Expected {_examples(kind)}, or hf:FOLDER.")


def _source_of(description: dict[str, Any]) -> str:
    source = description.get("source")
    if source not in SOURCES:
        raise UserError(
            f"An encoder of source {source!r}; known: {', '.join(SOURCES)}. Update train-clip, or build the encoder "
            "yourself and load its weights."
        )
    return str(source)


def _examples(kind: str) -> str:
    """Join an example of each source that has encoders of this kind."""
    examples = [source.image_example if kind == "image" else source.text_example for source in SOURCES.values()]
    return " or ".join(example for example in examples if example)


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
