"""What a step spends, of memory or of time. The gradient is the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.dual_encoder import DualEncoder
from train_clip.models.recompute import recompute_blocks

# Versions of a block that are compiled at most: by tower, training or not, and the shapes of the first two batches.
MOST_VERSIONS = 64


@dataclass(frozen=True)
class Economy:
    """How a step is computed.

    Args:
        minibatch_size: pairs encoded at a time on one process; 0 for all at once.
        kept_minibatches: how many of these micro-batches keep their activations, and are not computed again.
        gradient_checkpointing: blocks of a tower whose activations are computed again together; 0 for none.
        compile: compile the towers with ``torch.compile``.

    Raises:
        UserError: a number that cannot work.
    """

    minibatch_size: int = 0
    kept_minibatches: int = 0
    gradient_checkpointing: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("minibatch_size", "kept_minibatches", "gradient_checkpointing"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 or above.")

    def recompute(self, model: DualEncoder) -> None:
        """Have the towers that are trained recompute their blocks, where that is asked for.

        Raises:
            UserError: a tower cannot.
        """
        for tower in (model.visual, model.transformer):
            if self.gradient_checkpointing and any(parameter.requires_grad for parameter in tower.parameters()):
                recompute_blocks(tower, self.gradient_checkpointing)

    def prepare(self, model: DualEncoder) -> None:
        """Compile both towers, where that is asked for. Copies of the model, pickled ones too, are not compiled."""
        for tower in (model.visual, model.transformer) if self.compile else ():
            compile_tower(tower)


PLAIN = Economy()


def take_economy(given: dict[str, Any], minibatch_size: int) -> Economy:
    """Take the fields of ``Economy`` out of a wrapper's further arguments.

    Args:
        given: the arguments; is changed.
        minibatch_size: which the wrappers name themselves.
    """
    names = [field.name for field in dataclasses.fields(Economy) if field.name in given]
    return Economy(minibatch_size, **{name: given.pop(name) for name in names})


def compile_tower(tower: nn.Module) -> None:
    """Compile a tower in place: names of parameters, and checkpoints, stay as they are.

    A transformer is compiled block by block: all its blocks share one compiled form, in a fraction of the whole tower's
    time.
    """
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    transformers = [module for module in tower.modules() if isinstance(module, Transformer)]
    for block in (block for transformer in transformers for block in transformer.blocks()):
        block.compile()
    if not transformers:
        tower.compile()
