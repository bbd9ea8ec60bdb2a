"""Pretrained encoders by their source, and two of them from a checkpoint.

A source is a prefix that names a library, then the library's own name for the model.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from train_clip.checkpoints import found, own, read
from train_clip.errors import UsageError, UserError

if TYPE_CHECKING:  # `train-clip inspect` answers before PyTorch would be there
    from train_clip.encoders.encoder import ImageEncoder, TextEncoder


OWN = "train-clip"
LAST = "train-clip:RUN/checkpoints/last.ckpt"
# Behind a prefix: functions that "load" an encoder by its name or "build" a described one, and an example of each kind.
SOURCES = {
    "hf": (
        "train_clip.encoders.huggingface:{}_{}",
        {"image": "hf:facebook/dinov2-small", "text": "hf:sentence-transformers/all-mpnet-base-v2"},
    ),
    "timm": ("train_clip.encoders.libraries:{}_timm", {"image": "timm:resnet50"}),
    OWN: ("train_clip.encoders.libraries:{}_{}", {"image": LAST, "text": LAST}),
    "torchvision": ("train_clip.encoders.libraries:{}_torchvision", {"image": "torchvision:resnet50"}),
}


def load_image_encoder(source: str) -> "ImageEncoder":
    """Load a pretrained image encoder, such as "hf:facebook/dinov2-small", "hf:FOLDER" or "timm:resnet50".

    Raises:
        UserError: an unknown library or name, a library that is not installed, weights that do not fit.
    """
    return _load(source, "image")


def load_text_encoder(source: str) -> "TextEncoder":
    """Load a pretrained text encoder, such as "hf:sentence-transformers/all-mpnet-base-v2" or "hf:FOLDER".

    Raises:
        UserError: likewise.
    """
    return _load(source, "text")


def _load(source: str, kind: str) -> Any:
    prefix, _, name = source.partition(":")  # a name may hold further colons
    if not name or prefix not in SOURCES:
        if source and Path(source).exists():
            library = "hf" if Path(source).is_dir() else OWN
            raise UsageError(f"--{kind}_encoder {source}: a path without its library. Write {library}:{source}.")
        what = f"unknown prefix {prefix!r}" if name else "no library and name"
        raise UsageError(f"--{kind}_encoder {source}: {what}. Expected {_examples(kind)}, or hf:FOLDER.")
    functions, examples = SOURCES[prefix]
    if kind not in examples:
        raise UsageError(f"--{kind}_encoder {source}: {prefix} has no {kind} encoders. Expected {_examples(kind)}.")
    return pkgutil.resolve_name(functions.format("load", kind))(name)


def build_encoder(description: Any, kind: str) -> Any:
    """Build the "image" or "text" encoder that its description tells of, with random weights, without a network."""
    description = _described(description, f"{kind}_encoder")
    source = description.get("source")
    if source not in SOURCES:
        raise UserError(
            f"An encoder of source {source!r}; known: {', '.join(SOURCES)}. Update train-clip, or build the encoder "
            "yourself and load its weights."
        )
    functions, examples = SOURCES[source]
    if kind not in examples:
        raise UserError(f"A {kind} encoder of source {source!r}; expected {_examples(kind)}.")
    return pkgutil.resolve_name(functions.format("build", kind))(description)


def described_tokenizer(description: Any) -> Any:
    """Make the tokenizer that a checkpoint describes."""
    description = _described(description, "tokenizer")
    if description["source"] == "clip":
        from train_clip.data.tokenizer import Tokenizer

        return Tokenizer(description["context_length"])
    from train_clip.encoders.tokenizer import tokenizer_from

    return tokenizer_from(description)


def _described(description: Any, name: str) -> dict[str, Any]:
    if not isinstance(description, Mapping):
        raise UserError(
            f"The {name} is missing: the checkpoint does not say how to build it, because it was your own module. "
            f"Build it again: CustomCLIPWrapper.load_from_checkpoint(path, {name}=…)."
        )
    return dict(description)


def _examples(kind: str) -> str:
    return " or ".join(examples[kind] for _, examples in SOURCES.values() if kind in examples)


@dataclass(frozen=True, kw_only=True)
class FoundEncoders(found.Found):
    """Two encoders that ``finetune`` has joined."""

    @override
    def empty(self) -> tuple[Any, Any]:
        from train_clip.encoders.custom import CustomCLIP

        told = self.arguments
        image, text = (build_encoder(told[f"{kind}_encoder"], kind) for kind in ("image", "text"))
        model = CustomCLIP(image, text, told["avg_word_embs"], told["project"], told.get("loss", "softmax"))
        return model, described_tokenizer(told.get("tokenizer"))

    @override
    def describe(self) -> dict[str, str]:
        told = {name: self.arguments.get(name) for name in ("image_encoder", "text_encoder")}
        return {name: describe_encoder(description) for name, description in told.items()} | super().describe()


def find_encoders(contents: read.Contents) -> FoundEncoders | None:
    """Find a checkpoint of two encoders of ``finetune``."""
    told = own.of_lightning(contents)
    is_ours = {"image_encoder", "text_encoder"} <= set(told["arguments"])
    return FoundEncoders(format="train-clip checkpoint", **told) if is_ours else None


def describe_encoder(description: Any) -> str:
    """Name an encoder as the command line does."""
    if isinstance(description, Mapping) and all(isinstance(description.get(key), str) for key in ("source", "name")):
        return f"{description['source']}:{description['name']}"
    return "the user's own module, which the file does not say how to build"
