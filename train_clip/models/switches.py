"""Switches of a tower: gradient checkpointing, stochastic depth, dropped patches, compilation."""

from typing import Any

import torch

from train_clip.errors import UserError
from train_clip.models.blocks import Blocks, ResidualBlock, Transformer
from train_clip.models.vit import VisionTransformer


def recompute_blocks(tower: Any, group: int) -> None:
    """Have a tower recompute so many blocks together, 0 for none; those of transformers and timm do it one by one."""
    stacks = [module for module in tower.modules() if isinstance(module, Blocks)]
    for blocks in stacks:
        blocks.recompute = group
    if stacks or not group:
        return
    kind = type(tower).__name__
    if group != 1:
        raise UserError(f"gradient_checkpointing is {group}; {kind} recomputes each block separately. Expected 1.")
    if hasattr(tower, "gradient_checkpointing_enable"):
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(tower, "set_grad_checkpointing"):
        tower.set_grad_checkpointing(True)
    else:
        raise UserError(
            f"{kind} has no gradient checkpointing: found neither gradient_checkpointing_enable (transformers) nor "
            "set_grad_checkpointing (timm). Leave gradient_checkpointing out; minibatch_size saves memory with any "
            "encoder."
        )


def skip_blocks(tower: torch.nn.Module, name: str, highest: float) -> None:
    """Have the last block of a tower, image or text, left out for that share of the rows in training."""
    stacks = [module.resblocks for module in tower.modules() if isinstance(module, Transformer)]
    if highest and not stacks:
        raise UserError(
            f"stochastic_depth is {highest}; the {name} tower is {type(tower).__name__}, whose blocks cannot be "
            "skipped: a ResNet's end in more than a sum, and those of other libraries are not supported. Expected "
            "CLIP's own transformers, "
            f"such as ViT-B/32's. Leave out stochastic_depth, or freeze that tower: lock_{name}."
        )
    for blocks in stacks:
        blocks.stochastic_depth = highest


def compile_tower(tower: torch.nn.Module, dynamic: bool) -> None:
    """Compile a tower in place: names of parameters, and checkpoints, stay as they are; copies are not compiled.

    A transformer is compiled block by block: all its blocks share one form, in a fraction of the whole tower's time. So
    is a ResNet that recomputes its blocks. One form serves all shapes where ``dynamic``, or blocks are left out for
    some rows; else each shape has its own: one compiled again would part a chunk from its recomputation.
    """
    torch._dynamo.config.recompile_limit = 64  # forms of a block: by tower, training or not, and batch; not 8
    # As many rows as tokens in the first batch would be taken for one size, and the next form, for any sizes, then be
    # met in the first one's recomputation (tests/training/test_compile.py).
    torch.fx.experimental._config.use_duck_shape = False
    stacks = [module for module in tower.modules() if isinstance(module, Blocks)]
    dynamic = dynamic or any(blocks.stochastic_depth for blocks in stacks)
    by_block = [blocks for blocks in stacks if blocks.recompute or isinstance(blocks[0], ResidualBlock)]
    for part in [block for blocks in by_block for block in blocks] or [tower]:
        part.compile(dynamic=dynamic)


def patches_to_keep(tower: torch.nn.Module, mask_ratio: float) -> int:
    """K = round((1 - mask_ratio) · P), for ``kept_patches``; 0 where none are dropped."""
    if not mask_ratio:
        return 0
    if not isinstance(tower, VisionTransformer):
        raise UserError(
            f"mask_ratio is {mask_ratio}; the image tower is {type(tower).__name__}, which cannot drop patches. "
            "Expected CLIP's own vision transformer, such as ViT-B/32. Leave out mask_ratio."
        )
    patches = len(tower.positional_embedding) - 1
    kept = round((1 - mask_ratio) * patches)
    if not kept:
        raise UserError(
            f"mask_ratio is {mask_ratio}: no patch is left of the {patches:,} patches of an image. Expected at least "
            "one: use a lower ratio."
        )
    return kept
