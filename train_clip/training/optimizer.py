"""AdamW with decay on matrices only, and a cosine over the whole run (CLIP paper, section 2.5 and table 18)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from train_clip.models.config import OptimizerConfig

WARMUP_SHARE = 0.1  # of a run that is too short for the model's own warm-up


def build_adamw(module: nn.Module, config: OptimizerConfig, fused: bool = False) -> AdamW:
    """Make the optimizer of a module's trainable parameters.

    Args:
        module: on its device.
        config: the numbers.
        fused: one kernel for the whole update, which can be held back by a flag on the device (``found_inf``).
    """
    groups = parameter_groups(module, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay and those that do not.

    Weight decay falls on "all weights that are not gains or biases" (CLIP paper, section 2.5): in practice on those of
    two dimensions and more, which leaves out the temperature and the class embedding too.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_schedule(optimizer: AdamW, warmup_steps: int, num_steps: int) -> LambdaLR:
    """Make the learning-rate schedule, advanced once an optimizer step."""
    return LambdaLR(optimizer, cosine_with_warmup(warmup_steps, num_steps))


def warmup_for(num_steps: int, config: OptimizerConfig) -> int:
    """The warm-up of a run for which none is given: the model's own, or a tenth of the run where that is less."""
    return min(config.warmup_steps, int(WARMUP_SHARE * num_steps))


def cosine_with_warmup(warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Share of the peak rate at each optimizer step: a line up to 1, then half a cosine down to 0.

        step < w:  (step + 1) / w            otherwise:  ½ (1 + cos(π (step - w) / (num_steps - w)))

    Args:
        warmup_steps: w.
        num_steps: optimizer steps of the run; the rate would be 0 on the step after the last.
    """

    def share(step: int) -> float:
        """What the rate is of its peak."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return share
