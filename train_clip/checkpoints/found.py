"""What a file turned out to be: which model, which of its tensors, and what the file says of its making."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_clip.checkpoints.read import TensorRecord
from train_clip.models.config import ModelConfig
from train_clip.prompts.config import PromptConfig

if TYPE_CHECKING:  # `train-clip inspect` answers before PyTorch would be there
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]


def as_they_are(tensors: Tensors) -> Tensors:
    """The names of a format that are ours already, once its prefixes are off."""
    return tensors


@dataclass(frozen=True)
class Found:
    """A model in a file.

    Args:
        format: as ``train-clip inspect`` prints it.
        config: of a CLIP; None for two encoders of ``finetune``, which ``arguments`` tell of.
        records: its tensors, prefixes taken off.
        rename: maps them, read, to the names and shapes that the model has here.
        prompts: of a CLIP with visual prompts.
        unsaid: what of the configuration the file does not say: "activation", "heads".
        arguments: what the module that was trained was made with.
        about: what else the file says, for who reads it.
    """

    format: str
    config: ModelConfig | None
    records: Mapping[str, TensorRecord]
    rename: Callable[[Tensors], Tensors] = as_they_are
    prompts: PromptConfig | None = None
    unsaid: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """What a file may leave open, or is to be changed.

    Args:
        model_name: a preset or a YAML file that has the sizes, where weights do not tell how many heads they have.
        activation: ``quick_gelu`` or ``gelu``, where a file does not say.
        image_size: side of the images in pixels, if not the model's; its positional embeddings are interpolated.
        context_length: tokens of a caption at most, likewise.
        backbone: of a file of visual prompts, where its backbone lies, if not where it lay.
    """

    model_name: str | None = None
    activation: str | None = None
    image_size: int | None = None
    context_length: int | None = None
    backbone: str | Path | None = None


def without_prefix(records: Mapping[str, TensorRecord], prefix: str) -> dict[str, TensorRecord]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): record for name, record in records.items() if name.startswith(prefix)}
