"""OpenAI's files: TorchScript archives of half-precision weights, and state dicts of their models."""

from __future__ import annotations

import dataclasses

from train_clip.checkpoints.architecture import config_from_shapes, preset_of
from train_clip.checkpoints.contents import Contents
from train_clip.checkpoints.found import Found, Tensors
from train_clip.models.config import ModelConfig

# Whole numbers that OpenAI's archives hold as tensors; sizes are in the other tensors' shapes too.
MARKS = ("input_resolution", "context_length", "vocab_size")
MASK = "attn_mask"  # of the causal attention: a constant, which some archives keep with each block

# In a TorchScript archive each module has the name of its class: that of a block's activation tells which it is.
ACTIVATION = "transformer.resblocks.0.mlp.gelu"
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}


def find_openai(contents: Contents) -> Found | None:
    """A TorchScript archive, or a state dict with the three numbers of OpenAI's."""
    is_openai = set(MARKS) <= set(contents.tensors)
    if not is_openai and contents.kind != "TorchScript archive":
        return None
    records = {
        name: record for name, record in contents.tensors.items() if name.rpartition(".")[2] not in (*MARKS, MASK)
    }
    config = config_from_shapes(records, contents.path)
    activation = ACTIVATIONS.get(str(contents.data.get(ACTIVATION)).rpartition(".")[2])
    name = "OpenAI's" if is_openai else "TorchScript"
    # Sizes beside the weights are OpenAI's habit, and with them come its activation and its heads.
    unsaid = () if is_openai else unsaid_of(config)
    if activation is not None:
        config = dataclasses.replace(config, activation=activation)
        unsaid = tuple(word for word in unsaid if word != "activation")
    return Found(name, config, records, unsaid=unsaid)


def find_state_dict(contents: Contents) -> Found | None:
    """Weights under OpenAI's names and nothing else."""
    if "visual.conv1.weight" not in contents.tensors:
        return None
    config = config_from_shapes(contents.tensors, contents.path)
    return Found(
        "state dict under OpenAI's names", config, contents.tensors, scalar_temperature, unsaid=unsaid_of(config)
    )


def scalar_temperature(tensors: Tensors) -> Tensors:
    """The temperature of some of open_clip's models has one dimension, of size 1, and so has their bias."""
    found = {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
    return {**tensors, **{name: tensor.reshape(()) for name, tensor in found.items() if tensor.numel() == 1}}


def unsaid_of(config: ModelConfig) -> tuple[str, ...]:
    """What shapes alone leave open: the activation, and the heads of a model that is none of the presets."""
    return ("activation",) if preset_of(config) is not None else ("activation", "heads")
