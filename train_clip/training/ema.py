"""The exponential moving average (EMA) of a model's weights: distillation's teacher, and what ``--ema`` keeps."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.models.clip import DualEncoder


class WeightsEMA(nn.Module):
    """An EMA of a model's weights with a warm-up, after n updates; never trained, always in eval mode.

        m = min(momentum, (1 + n) / (10 + n))            ema ← m · ema + (1 - m) · model

    The warm-up is that of OTTER's code (github.com/facebookresearch/OTTER). The EMA is float32 even where the model is
    kept in bfloat16. Buffers, BatchNorm's statistics among them, are copied. What is frozen when the EMA is made is
    held once, for both.
    """

    def __init__(self, model: DualEncoder, momentum: float) -> None:
        super().__init__()
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, frozen).requires_grad_(False)
        self.momentum = momentum
        self.num_updates = 0
        self.eval()

    @override
    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def follow(self, model: DualEncoder) -> None:
        """Move towards the model, after an update."""
        share = 1 - min(self.momentum, (1 + self.num_updates) / (10 + self.num_updates))
        own: list[Tensor] = []
        theirs: list[Tensor] = []
        for mean, now in zip(self.model.parameters(), model.parameters(), strict=True):
            if mean.dtype != now.dtype:
                # One by one: copies of all half weights at once would be as large as the EMA.
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

    @override
    def get_extra_state(self) -> dict[str, int]:
        return {"num_updates": self.num_updates}

    @override
    def set_extra_state(self, state: Any) -> None:
        self.num_updates = state["num_updates"]


def ema_figure(figure: str) -> str:
    """The name of a validation's figure, ``val/…``, where it is the EMA's."""
    return "val_ema/" + figure.removeprefix("val/")
