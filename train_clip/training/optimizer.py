"""AdamW with decay on matrices only, and a cosine over the whole run (CLIP paper, section 2.5 and table 18)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

MAX_WARMUP = 2_000  # steps (CLIP paper, table 18)
WARMUP_SHARE = 0.1  # of a run that is too short for them


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW's numbers, resolved.

    Args:
        learning_rate: at the peak.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: on parameters of two dimensions and more.
        warmup_steps: steps until the peak; None for the smaller of 2,000 and a tenth of the run.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int | None


def build_adamw(module: nn.Module, config: AdamWConfig) -> AdamW:
    """Make the optimizer of a module's trainable parameters."""
    groups = parameter_groups(module, config.weight_decay)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


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


def build_schedule(optimizer: AdamW, warmup_steps: int | None, num_steps: int) -> LambdaLR:
    """Make the learning-rate schedule, advanced once an optimizer step."""
    warmup = min(MAX_WARMUP, int(WARMUP_SHARE * num_steps)) if warmup_steps is None else warmup_steps
    return LambdaLR(optimizer, cosine_with_warmup(warmup, num_steps))


def cosine_with_warmup(warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Share of the peak rate at each optimizer step: a line up to 1, then half a cosine down to 0.

        step < w:  (step + 1) / w            otherwise:  ½ (1 + cos(π (step - w) / (num_steps - w)))

    Args:
        warmup_steps: w.
        num_steps: optimizer steps of the run; the rate would be 0 on the step after the last.
    """

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return share
