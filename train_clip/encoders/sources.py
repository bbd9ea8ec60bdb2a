"""Pretrained encoders by their source, and two of them out of a checkpoint.

A source is a prefix that names a library, then the library's own name for the model.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from typing_extensions import override

from train_clip.checkpoints.found import Found, any_chosen
from train_clip.checkpoints.own import of_lightning
from train_clip.checkpoints.read import Contents
from train_clip.errors import UserError
from train_clip.options import WeightOptions

if TYPE_CHECKING:  # `train-clip inspect` answers before PyTorch would be there
    from train_clip.encoders.custom import CustomCLIP
    from train_clip.encoders.encoder import ImageEncoder, TextEncoder


class Source(NamedTuple):
    """What stands behind a prefix: functions that "load" an encoder by its name, or "build" a described one."""

    functions: str
    example: str  # for messages


OWN = "train-clip"
LAST = "train-clip:RUN/checkpoints/last.ckpt"
SOURCES = {
    "hf": {
        "image": Source("train_clip.encoders.huggingface:{}_image", "hf:facebook/dinov2-small"),
        "text": Source("train_clip.encoders.huggingface:{}_text", "hf:sentence-transformers/all-mpnet-base-v2"),
    },
    "timm": {"image": Source("train_clip.encoders.libraries:{}_timm", "timm:resnet50")},
    OWN: {
        "image": Source("train_clip.encoders.libraries:{}_image", LAST),
        "text": Source("train_clip.encoders.libraries:{}_text", LAST),
    },
    "torchvision": {"image": Source("train_clip.encoders.libraries:{}_torchvision", "torchvision:resnet50")},
}


def load_image_encoder(source: str) -> ImageEncoder:
    """Load a pretrained image encoder, such as "hf:facebook/dinov2-small", "hf:FOLDER" or "timm:resnet50"."""
    return _load(source, "image")


def load_text_encoder(source: str) -> TextEncoder:
    """Load a pretrained text encoder, such as "hf:sentence-transformers/all-mpnet-base-v2" or "hf:FOLDER"."""
    return _load(source, "text")


def build_image_encoder(description: Mapping[str, Any]) -> ImageEncoder:
    """Build the image encoder that an ``ImageEncoder.description`` tells of, with random weights, without a network."""
    return _build(description, "image")


def build_text_encoder(description: Mapping[str, Any]) -> TextEncoder:
    """Build the text encoder that a ``TextEncoder.description`` tells of, with random weights, without a network."""
    return _build(description, "text")


def _load(source: str, kind: str) -> Any:
    prefix, colon, name = source.partition(":")  # a name may hold further colons
    if not (colon and name and prefix in SOURCES):
        if source and Path(source).exists():
            library = "hf" if Path(source).is_dir() else OWN
            raise UserError(f"--{kind}_encoder {source}: a path without its library. Write {library}:{source}.")
        what = f"unknown prefix {prefix!r}" if colon and prefix not in SOURCES else "no library and name"
        raise UserError(f"--{kind}_encoder {source}: {what}. Expected {_examples(kind)}, or hf:FOLDER.")
    if kind not in SOURCES[prefix]:
        raise UserError(f"--{kind}_encoder {source}: {prefix} has no {kind} encoders. Expected {_examples(kind)}.")
    return pkgutil.resolve_name(SOURCES[prefix][kind].functions.format("load"))(name)


def _build(description: Mapping[str, Any], kind: str) -> Any:
    source = description.get("source")
    if source not in SOURCES:
        raise UserError(
            f"An encoder of source {source!r}; known: {', '.join(SOURCES)}. Update train-clip, or build the encoder "
            "yourself and load its weights."
        )
    if kind not in SOURCES[source]:
        raise UserError(f"A {kind} encoder of source {source!r}; expected {_examples(kind)}.")
    return pkgutil.resolve_name(SOURCES[source][kind].functions.format("build"))(dict(description))


def _examples(kind: str) -> str:
    return " or ".join(kinds[kind].example for kinds in SOURCES.values() if kind in kinds)


@dataclass(frozen=True, kw_only=True)
class FoundEncoders(Found):
    """Two encoders that ``finetune`` has joined."""

    @override
    def require_clip(self, instead: str = "; expected a CLIP.") -> NoReturn:
        raise UserError(f"{self.source}: two encoders{instead}")

    @override
    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Self:
        if backbone is not None:
            self.refuse(f"{self.format}, a whole model. Leave the backbone out")
        if any_chosen(choices):
            self.refuse("two encoders, whose sizes and activations are their own. Leave the choices out")
        return self

    @override
    def empty(self) -> tuple[CustomCLIP, Any]:
        from train_clip.encoders.custom import CustomCLIP

        arguments = self.arguments
        for name in ("image_encoder", "text_encoder", "tokenizer"):
            if not isinstance(arguments.get(name), Mapping):
                raise UserError(
                    f"The checkpoint does not say how to make its {name}, which was one of your own. Make it, and load "
                    f"with CustomCLIPWrapper.load_from_checkpoint(PATH, {name}=…)."
                )
        image, text = build_image_encoder(arguments["image_encoder"]), build_text_encoder(arguments["text_encoder"])
        model = CustomCLIP(image, text, arguments["avg_word_embs"], arguments["project"])
        if arguments.get("loss") == "sigmoid":
            model.add_bias()
        return model, described_tokenizer(arguments["tokenizer"])

    @override
    def describe(self) -> dict[str, str]:
        told = {name: self.arguments.get(name) for name in ("image_encoder", "text_encoder")}
        return {name: _described(description) for name, description in told.items()} | super().describe()


def find_encoders(contents: Contents) -> FoundEncoders | None:
    """Find a checkpoint of two encoders of ``finetune``."""
    told = of_lightning(contents)
    is_ours = {"image_encoder", "text_encoder"} <= set(told["arguments"])
    return FoundEncoders(format="train-clip checkpoint", **told) if is_ours else None


def _described(description: Any) -> str:
    if isinstance(description, Mapping) and all(isinstance(description.get(key), str) for key in ("source", "name")):
        return f"{description['source']}:{description['name']}"
    return "a module of the user's own, which the file does not say how to make"


def described_tokenizer(description: Mapping[str, Any]) -> Any:
    """Make the tokenizer that a checkpoint describes."""
    if description["source"] == "clip":
        from train_clip.data.tokenizer import Tokenizer

        return Tokenizer(description["context_length"])
    from train_clip.encoders.tokenizer import tokenizer_from

    return tokenizer_from(dict(description))
