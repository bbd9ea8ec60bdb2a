"""Visual prompts in files: ours, small and beside a backbone that lies elsewhere, and those of train-CLIP's fork."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from train_clip.checkpoints.found import Found, without_prefix
from train_clip.checkpoints.openai import config_from_shapes
from train_clip.checkpoints.own import LIGHTNING, MODEL, progress
from train_clip.checkpoints.read import Contents, TensorRecord
from train_clip.errors import UserError, first_line
from train_clip.models.config import ViTConfig
from train_clip.prompts.config import PromptConfig

TOWER, BACKBONE, PROMPTS = "visual.", "visual.backbone.", "visual.prompts."
# Arguments of a PromptCLIPWrapper that its checkpoints are known by.
OF_WRAPPER: dict[str, type] = {"backbone": str, "prompts": Mapping, "digest": str, "config": Mapping}
LEFT_OUT = "left out"
OF_FORK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.prompt_embeddings")
FORK_DROPOUT = 0.2  # of the fork's model

T = TypeVar("T")


def find_prompts(contents: Contents) -> Found | None:
    """A checkpoint of ``prompt-tune``: what was trained, and which backbone it belongs to."""
    arguments = contents.data.get("hyper_parameters")
    if not isinstance(arguments, Mapping) or not set(OF_WRAPPER) <= set(arguments):
        return None
    if odd := [name for name, kind in OF_WRAPPER.items() if not isinstance(arguments[name], kind)]:
        raise UserError(f"{contents.path}: its {odd[0]} is not as this package writes it. Get the file again.")
    try:
        given = dict(arguments["prompts"])
        prompts = PromptConfig(**(given | {"layers": tuple(given["layers"])}))
    except (KeyError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{contents.path}: its prompts are not as this package writes them ({reason}).") from error
    return Found(
        "train-clip visual prompts",
        None,
        without_prefix(contents.tensors, MODEL),
        prompts=prompts,
        arguments=arguments,
        about={
            "backbone": arguments["backbone"],
            "its SHA-256": arguments["digest"],
            "prompts": describe(prompts),
            **progress(contents.data),
        },
    )


def find_fork(contents: Contents) -> Found | None:
    """A checkpoint of the fork's CLIPWrapper2: a whole model, with prompts in each block.

    Its first block inserts them, the middle ones replace, and the last one lets those of the block before pass: its own
    were never used, and are left out.
    """
    if LIGHTNING not in contents.data:
        return None
    records = without_prefix(contents.tensors, MODEL)
    prompts = {int(found[1]): record for name, record in records.items() if (found := OF_FORK.fullmatch(name))}
    if not prompts:
        return None
    backbone = {name: record for name, record in records.items() if not OF_FORK.fullmatch(name)}
    config = config_from_shapes(backbone, contents.path)
    if not isinstance(config.image, ViTConfig):
        raise UserError(f"{contents.path}: prompts in a ResNet, which has no tokens. Get the file again.")
    last = config.image.layers - 1
    used = {number: record for number, record in sorted(prompts.items()) if number != last}
    unused = f"visual.transformer.resblocks.{last}.prompt_embeddings" if last in prompts else None
    tuned = PromptConfig(_number(used, contents), tuple(used), FORK_DROPOUT, class_token=True)
    names = join({f"{PROMPTS}{number}": record for number, record in used.items()}, backbone)
    about = {"prompts": describe(tuned), LEFT_OUT: unused} | progress(contents.data)
    return Found("train-CLIP fork's checkpoint (CLIPWrapper2)", config, names, prompts=tuned, about=about)


def join(prompts: Mapping[str, T], backbone: Mapping[str, T]) -> dict[str, T]:
    """What was trained, and the backbone under the names that it has once prompts are in its tower."""
    return {_below_backbone(name): value for name, value in backbone.items()} | dict(prompts)


def describe(prompts: PromptConfig) -> str:
    """In words."""
    layers = ", ".join(map(str, prompts.layers))
    return f"{prompts.number} at each of the blocks {layers}" + ("; class token trained" if prompts.class_token else "")


def _below_backbone(name: str) -> str:
    return BACKBONE + name.removeprefix(TOWER) if name.startswith(TOWER) else name


def _number(prompts: Mapping[int, TensorRecord], contents: Contents) -> int:
    numbers = {record.shape[0] if len(record.shape) == 2 else 0 for record in prompts.values()}
    if len(numbers) != 1:
        raise UserError(f"{contents.path}: its blocks have {sorted(numbers)} prompts; expected as many in each.")
    return numbers.pop()
