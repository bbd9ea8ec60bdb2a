"""What a step spends, of memory or of time. The gradient is the same, but for which random numbers dropout draws."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes

from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.dual_encoder import DualEncoder
from train_clip.models.recompute import BlockStack, recompute_blocks

# Compiled forms of a block at most: by tower, training or not, and by batch. PyTorch gives up after 8.
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
        if self.compile:
            # Blocks that are left out by chance see another number of rows each, and would be compiled for each number.
            stacks = [module for module in model.visual.modules() if isinstance(module, Transformer)]
            compile_tower(model.visual, dynamic=any(stack.stochastic_depth for stack in stacks))
            compile_tower(model.transformer, dynamic=True)


PLAIN = Economy()


def take_economy(given: dict[str, Any], minibatch_size: int) -> Economy:
    """Take the fields of ``Economy`` out of a wrapper's further arguments.

    Args:
        given: the arguments; is changed.
        minibatch_size: which the wrappers name themselves.
    """
    names = [field.name for field in dataclasses.fields(Economy) if field.name in given]
    return Economy(minibatch_size, **{name: given.pop(name) for name in names})


def compile_tower(tower: nn.Module, dynamic: bool) -> None:
    """Compile a tower in place: names of parameters, and checkpoints, stay as they are.

    A transformer is compiled block by block: all its blocks share one compiled form, in a fraction of the whole tower's
    time. So is a ResNet that recomputes its blocks, which the compiler cannot see through.

    Args:
        tower: is changed.
        dynamic: whether one form serves all shapes, as of captions and under stochastic depth, or each shape has its
            own, as of images. What is compiled again once shapes turn out to change would part a chunk from its
            recomputation.
    """
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    # As many rows as tokens in the first batch would be taken for one size, and the next form, for any sizes, then be
    # met in the first one's recomputation (tests/training/test_economy.py).
    shapes.use_duck_shape = False
    stacks = [module for module in tower.modules() if isinstance(module, BlockStack)]
    by_block = [stack for stack in stacks if isinstance(stack, Transformer) or stack.recompute]
    for block in (block for stack in by_block for block in stack.blocks()):
        block.compile(dynamic=dynamic)
    if not by_block:
        tower.compile(dynamic=dynamic)
