"""Towers compiled by ``torch.compile``, so that names of parameters, and checkpoints, stay as they are."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx.experimental import _config as shapes

from train_clip.models.blocks import BlockStack, Transformer
from train_clip.models.clip import DualEncoder

# Compiled forms of a block at most: by tower, training or not, and by batch. PyTorch gives up after 8.
MOST_VERSIONS = 64


def compile_towers(model: DualEncoder) -> None:
    """Compile both towers in place. Copies of the model, pickled ones too, are not compiled."""
    # Under stochastic depth each block sees another number of rows, and would be compiled for each number.
    stacks = [module for module in model.visual.modules() if isinstance(module, Transformer)]
    compile_tower(model.visual, dynamic=any(stack.stochastic_depth for stack in stacks))
    compile_tower(model.transformer, dynamic=True)


def compile_tower(tower: nn.Module, dynamic: bool) -> None:
    """Compile one form for all shapes (captions), or one for each (images), with ``dynamic`` settled beforehand.

    What is compiled again once shapes turn out to change would part a chunk from its recomputation. A transformer is
    compiled block by block: all its blocks share one compiled form, in a fraction of the whole tower's time. So is a
    ResNet that recomputes its blocks, which the compiler cannot see through.
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
