"""Tell what lies in a file of weights, in a moment: neither PyTorch nor the model is needed for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from train_clip.checkpoints.formats import identify
from train_clip.checkpoints.found import Found
from train_clip.checkpoints.openai import describe
from train_clip.checkpoints.read import Contents
from train_clip.checkpoints.sources import find_contents

# A module's arguments that say which model it is, and not how it was trained.
OF_MODEL = ("model_name", "config", "image_encoder", "text_encoder", "tokenizer", "backbone", "prompts", "digest")
MOST_ITEMS, LONGEST = 10, 200  # items of a list and letters of a value that are printed
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's, which are no parameters


def inspect(file: str, /) -> dict[str, str]:
    """Tell what a file of weights is: which model, which step, which numbers it was trained with.

    Args:
        file: a checkpoint, a file or a folder of weights, or hf-hub:NAME

    Returns:
        What is printed, by its heading.

    Raises:
        UserError: nothing there, nothing that is known, damaged or hostile.
    """
    contents = find_contents(file)
    found = identify(contents)
    report = {"file": str(contents.path), "format": f"{found.format} ({_container(contents)})"} | _model(found)
    report |= {name: _shown(value) for name, value in found.about.items() if value is not None}
    trained = {name: value for name, value in found.arguments.items() if name not in OF_MODEL and value is not None}
    if trained:
        report["trained with"] = ", ".join(f"{_shown(name)} {_shown(value)}" for name, value in trained.items())
    report = {name: _printable(value) for name, value in report.items()}
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {value}")
    return report


def _shown(value: Any) -> str:
    """A value out of a file, or what it is: it may be too large to be written out."""
    if isinstance(value, list | tuple) and len(value) <= MOST_ITEMS:
        return f"[{', '.join(map(_item, value))}]"
    return _item(value)


def _item(value: Any) -> str:
    is_plain = isinstance(value, bool | int | float | str | None)
    return str(value)[:LONGEST] if is_plain else f"({type(value).__name__})"


def _printable(text: str) -> str:
    """Without the codes by which a file could write all over a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _container(contents: Contents) -> str:
    files = {record.file for record in contents.tensors.values()}
    size = sum(file.stat().st_size for file in files)
    return f"{contents.kind}, {size / 2**20:,.1f} MiB" + (f" in {len(files)} files" if len(files) > 1 else "")


def _model(found: Found) -> dict[str, str]:
    """The model in words: its sizes, or its two encoders by their names."""
    kinds = sorted({record.dtype for record in found.records.values()})
    parameters = sum(math.prod(record.shape) for name, record in found.records.items() if not name.endswith(BUFFERS))
    weights = {"weights": f"{parameters:,} parameters in {len(found.records):,} tensors, {', '.join(kinds)}"}
    if found.config is None and found.prompts is not None:
        return weights
    if found.config is None:
        return {name: _encoder(found.arguments.get(name)) for name in ("image_encoder", "text_encoder")} | weights
    config = found.config
    activation = "not said by the file" if "activation" in found.unsaid else config.activation
    bias = {"logits": "with a bias, of the sigmoid loss"} if config.logit_bias else {}
    heads = "; how many heads is not said by the file" if "heads" in found.unsaid else ""
    return {"model": config.name, **describe(config), "activation": activation + heads} | bias | weights


def _encoder(description: Any) -> str:
    if not isinstance(description, Mapping) or not {"source", "name"} <= set(description):
        return "a module of the user's own, which the file does not say how to make"
    return f"{_shown(description['source'])}:{_shown(description['name'])}"
