"""The running mean of a model's weights: distillation's teacher, and what ``--ema`` scores and keeps.

n  updates that it has followed
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from train_clip.models.clip import DualEncoder

OF_MEAN = "val_ema/"  # before the names of its figures, in place of "val/"


class RunningMean(nn.Module):
    """The exponential moving average of a model's weights, with a warm-up; never trained, always in eval mode.

        m = min(momentum, (1 + n) / (10 + n))            mean ← m · mean + (1 - m) · model

    The warm-up is that of OTTER's code (github.com/facebookresearch/OTTER). The mean is float32 even where what it is
    of is kept in bfloat16. Buffers, BatchNorm's statistics among them, are copied. What is locked when the mean is made
    is held once, for both.

    Args:
        model: the mean starts as a copy.
        momentum: from 0, which is the model itself, to below 1.
    """

    def __init__(self, model: DualEncoder, momentum: float) -> None:
        super().__init__()
        locked = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, locked).requires_grad_(False)
        self.momentum = momentum
        self.num_updates = 0
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, model: DualEncoder) -> None:
        """Move towards the model, after an update."""
        share = 1 - min(self.momentum, (1 + self.num_updates) / (10 + self.num_updates))
        own: list[Tensor] = []
        theirs: list[Tensor] = []
        for mean, now in zip(self.model.parameters(), model.parameters(), strict=True):
            if mean.dtype != now.dtype:
                # One by one: copies of all half weights at once would be as large as the mean.
                mean.lerp_(now.to(mean.dtype), share)
            elif mean is not now:
                own.append(mean)
                theirs.append(now.detach())
        if own:
            torch._foreach_lerp_(own, theirs, share)
        for buffer, seen in zip(self.model.buffers(), model.buffers(), strict=True):
            # On a GPU a forward pass that went wrong is found out later, and has left its mark on BatchNorm by then.
            buffer.copy_(torch.where(seen.isfinite(), seen, buffer))
        self.num_updates += 1

    def get_extra_state(self) -> dict[str, int]:
        """What the state dict holds besides tensors."""
        return {"num_updates": self.num_updates}

    def set_extra_state(self, state: Any) -> None:
        """Go on from a state dict."""
        self.num_updates = state["num_updates"]


def of_mean(figure: str) -> str:
    """The name of a validation's figure, ``val/…``, where it is the mean's."""
    return OF_MEAN + figure.removeprefix("val/")
