"""Gradient checkpointing: of a group of blocks only the input is kept; the rest is computed again in the backward pass.

Chen et al. 2016, arXiv 1604.06174; CLIP paper, section 2.5. The gradient is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_clip.errors import UserError
from train_clip.models.running_statistics import still, training_norms
from train_clip.models.stochastic_depth import skip_rates, through_some_rows

Block = Callable[[Tensor], Tensor]
Steps = Sequence[tuple[Block, float]]
"""Blocks, and the share of the rows that each is left out for."""


class BlockStack(nn.Module):
    """What runs through blocks, a few of which may be recomputed together: ``run_blocks(…, self.recompute)``."""

    recompute: int = 0

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks, first to last."""
        raise NotImplementedError


def recompute_blocks(tower: nn.Module, group: int) -> None:
    """Have the blocks of a tower recomputed.

    Args:
        tower: of this package, or of a library that can do it by itself (transformers, timm).
        group: blocks that are recomputed together, at least 1; libraries recompute each by itself.

    Raises:
        UserError: the tower offers no such thing.
    """
    stacks = [module for module in tower.modules() if isinstance(module, BlockStack)]
    for stack in stacks:
        stack.recompute = group
    if stacks:
        return
    library: Any = tower
    kind = type(tower).__name__
    if group != 1:
        raise UserError(f"gradient_checkpointing is {group}; {kind} recomputes each block by itself. Expected 1.")
    if hasattr(library, "gradient_checkpointing_enable"):
        library.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(library, "set_grad_checkpointing"):
        library.set_grad_checkpointing(True)
    else:
        raise UserError(
            f"{kind} has no gradient checkpointing: found neither gradient_checkpointing_enable (transformers) nor "
            "set_grad_checkpointing (timm). Leave gradient_checkpointing out; minibatch_size saves memory with any "
            "encoder."
        )


def run_blocks(blocks: Sequence[Block], x: Tensor, group: int, skipping: float = 0.0) -> Tensor:
    """Map x through blocks, one after the other.

    Args:
        blocks: each maps what the one before it gives. Dropout and stochastic depth meet the same random state in the
            recomputation, and running statistics of BatchNorms among them are updated once.
        x: what the first one takes.
        group: blocks that are recomputed together; 0 to keep everything.
        skipping: share of the rows that the last block is left out for (``stochastic_depth.py``); 0 for none.

    Returns:
        What the last one gives.
    """
    steps = list(zip(blocks, skip_rates(skipping, len(blocks)), strict=True))
    if group == 0 or not torch.is_grad_enabled():
        return _run(steps, x)
    for start in range(0, len(steps), group):
        some = steps[start : start + group]

        def contexts(some: Steps = some) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """Of the forward pass and of the recomputation."""
            modules = [block for block, _ in some if isinstance(block, nn.Module)]
            return nullcontext(), still([norm for module in modules for norm in training_norms(module)])

        x = cast(Tensor, checkpoint(_run, some, x, use_reentrant=False, context_fn=contexts))
    return x


def _run(steps: Steps, x: Tensor) -> Tensor:
    for block, rate in steps:
        x = through_some_rows(block, x, rate) if rate else block(x)
    return x
