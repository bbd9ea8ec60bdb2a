"""Keeps a step whose loss or gradient is not finite from changing anything, and a run from going on after it.

The update is held back on the device, by the ``found_inf`` that PyTorch's fused optimizers take, and the flag is read
where that costs nothing: at once on a CPU; on a GPU when figures are logged, and before anything is saved. Under
16-mixed the gradient scaler skips such steps by itself, as it must while it looks for a scale: there they are counted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from train_clip.errors import UserError
from train_clip.gather import on_any

MOST_SKIPPED = 20  # steps in a row; each halves the scaler's scale, which starts at 65,536


class FiniteSteps:
    """Watches the loss and the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self.gradient_norm = torch.zeros(())
        self._losses: list[Tensor] = []  # of the batches of this step
        self._report = torch.zeros(2)  # the first batch that was not finite, or 0; its loss
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def note_loss(self, loss: Tensor) -> Tensor:
        """Take note of a batch's loss, and see to it that one that is not finite gives gradients that are not.

        Args:
            loss: () float.

        Returns:
            The same value with the same gradient, bit for bit, where it is finite.
        """
        value = loss.detach().float()
        self._losses.append(value)
        return loss * torch.where(value.isfinite(), 1.0, torch.nan).to(loss.dtype)

    def keep_statistics(self, module: nn.Module) -> None:
        """Copy the running statistics of BatchNorms, before a step that may be skipped and survived."""
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
        self._statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def before_update(self, optimizer: torch.optim.Optimizer, scaler: Any, batch: int) -> None:
        """Look at a step's gradient, between the backward pass and the update.

        Args:
            optimizer: about to step.
            scaler: of the gradient, unscaled by now; None without one.
            batch: number of the step's last batch, from 1, for the message.

        Raises:
            UserError: the step is not finite, where that is known at once, or too many were skipped.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = get_total_norm(gradients)
        bad = on_any(~self.gradient_norm.isfinite())
        loss, self._losses = torch.stack(self._losses or [bad]).mean(), []
        if scaler is not None:
            self._count(bool(bad), scaler, batch)
            return
        found = torch.stack([torch.full_like(bad, batch), loss])
        known = self._report.to(bad.device)
        self._report = torch.where(known[0] > 0, known, torch.where(bad > 0, found, 0.0))
        if known_at_once(bad) or not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.read()
        else:
            # From the first bad step to the reading of the flag nothing is updated any more.
            optimizer.found_inf = (self._report[0] > 0).float()  # type: ignore[attr-defined]

    def read(self) -> None:
        """Read the flag, which waits for the device.

        Raises:
            UserError: a step was not finite.
        """
        batch, loss = self._report.tolist()
        if batch:
            raise UserError(
                f"Batch {batch:,.0f}: the loss is {loss:.4g}{', its gradient not finite' * math.isfinite(loss)}; "
                "expected finite numbers. No weight was changed by this batch or after it, and no checkpoint holds it. "
                "Train again with a lower --learning_rate, more --warmup_steps or --gradient_clip_val 1.0; if it is "
                "the same batch each time, look for an image or caption that is not like the others."
            )

    def _count(self, bad: bool, scaler: Any, batch: int) -> None:
        """Count a step that the scaler skips, and undo what its forward pass did to running statistics."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if not bad:
            return
        for buffer, before in self._statistics:
            buffer.copy_(before)
        scale = scaler.get_scale() * scaler.get_backoff_factor()
        if self.skipped_in_a_row >= MOST_SKIPPED or scale < 1:
            raise UserError(
                f"Batch {batch:,}: the gradient was not finite in {self.skipped_in_a_row} steps in a row, at a scale "
                f"that is down to {scale:g}. Expected it to fit into half precision within {MOST_SKIPPED} steps, at a "
                "scale of 1 or above. No weight was changed by these steps. Try --precision bf16-mixed, or 32-true "
                "where the GPU has no bfloat16; or a lower --learning_rate."
            )


def known_at_once(flag: Tensor) -> bool:
    """Whether reading a flag waits for nothing."""
    return flag.is_cpu
