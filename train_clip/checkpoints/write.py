"""A model → the formats of others, each of which this package reads too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from train_clip.checkpoints.huggingface_folder import write_huggingface
from train_clip.checkpoints.open_clip import write_config
from train_clip.checkpoints.own import METADATA
from train_clip.checkpoints.read import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from train_clip.errors import UserError
from train_clip.files import BESIDE, replacing, sync_folder, write_text
from train_clip.models.clip import CLIP, DualEncoder
from train_clip.prompts.model import PromptedTransformer


def write_model(model: DualEncoder, target: Path, kind: str) -> None:
    """Write a model whole or not at all.

    Args:
        model: what ``load`` gives.
        target: a folder, or for ``safetensors`` a file; it must not be there yet.
        kind: a key of ``WRITERS``.

    Raises:
        UserError: it is there already, or the format cannot hold the model.
    """
    if not isinstance(model, CLIP):
        raise UserError(
            f"{model.name}: two encoders joined by this package, which no format of others holds: each says which CLIP "
            "it is by its sizes alone. Keep the .ckpt, which `evaluate`, `finetune --pretrained` and train_clip.load "
            "read; or save its encoders by themselves, in Python: model.visual, model.transformer."
        )
    if isinstance(model.visual, PromptedTransformer):
        raise UserError(
            f"{model.name}: a CLIP with visual prompts, which no format of others holds. Keep the .ckpt, which "
            "`evaluate` and train_clip.load read."
        )
    require_writable(target)
    WRITERS[kind](model, target)


def require_writable(target: Path) -> None:
    """Refuse a place where something is.

    Raises:
        UserError: there is.
    """
    if target.exists():
        raise UserError(f"{target}: exists already and stays as it is. Give another name, or remove it.")


def _write_safetensors(model: CLIP, target: Path) -> None:
    """One file of tensors under OpenAI's names, the configuration in its metadata."""
    with replacing(target) as beside:
        save_file(_tensors(model), beside, metadata={"format": "pt", METADATA: json.dumps(model.config.to_dict())})


def _write_open_clip(model: CLIP, target: Path) -> None:
    """A folder that ``open_clip.create_model("local-dir:FOLDER")`` takes."""
    with _new_folder(target) as folder:
        save_file(_tensors(model), folder / OPEN_CLIP_WEIGHTS)
        write_text(folder / OPEN_CLIP_CONFIG, json.dumps(write_config(model.config), indent=2) + "\n")


def _write_huggingface(model: CLIP, target: Path) -> None:
    with _new_folder(target) as folder:
        write_huggingface(model.config, model.state_dict(), folder)


WRITERS: dict[str, Callable[[CLIP, Path], None]] = {
    "open_clip": _write_open_clip,
    "huggingface": _write_huggingface,
    "safetensors": _write_safetensors,
}


def _tensors(model: CLIP) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name once all of it is written."""
    beside = target.with_name(f"{target.name}{BESIDE}{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        sync_folder(beside)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
