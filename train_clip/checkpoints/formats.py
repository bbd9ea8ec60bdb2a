"""Every format that is read, in the order in which they are tried: the first that knows a file says what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from train_clip.checkpoints import huggingface, open_clip, openai, own
from train_clip.checkpoints.found import Found
from train_clip.checkpoints.read import Contents
from train_clip.errors import UserError
from train_clip.prompts import file as prompts

# Those that say what they are come before those that are told by the names of their tensors.
FORMATS: tuple[Callable[[Contents], Found | None], ...] = (
    prompts.find_prompts,
    own.find_checkpoint,
    own.find_safetensors,
    prompts.find_fork,
    own.find_train_clip,
    huggingface.find_huggingface,
    open_clip.find_with_config,
    open_clip.find_training,
    openai.find_openai,
    open_clip.find_custom_text,
    openai.find_state_dict,
)
# Before each name, of models that were wrapped for several processes or compiled when they were saved.
WRAPPINGS = ("module.", "_orig_mod.")
MOST_WRAPPINGS = 4  # of each, one in another


def identify(contents: Contents) -> Found:
    """Say which model lies in a file.

    Raises:
        UserError: none that is known.
    """
    contents = _unwrapped(contents)
    for find in FORMATS:
        if (found := find(contents)) is not None:
            return found
    some = ", ".join(list(contents.tensors)[:5])
    raise UserError(
        f"{contents.path}: {len(contents.tensors):,} tensors ({some}, …) that are no CLIP's. Expected one by OpenAI, "
        "open_clip, Hugging Face or this package. To begin with encoders of other kinds: train-clip finetune "
        "--image_encoder … --text_encoder …"
    )


def _unwrapped(contents: Contents) -> Contents:
    """Take off what stands before every name."""
    tensors = contents.tensors
    for _ in range(MOST_WRAPPINGS):
        for prefix in WRAPPINGS:
            if tensors and all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): record for key, record in tensors.items()}
    return dataclasses.replace(contents, tensors=tensors)
