"""Self-distillation: a teacher that is the running mean of its student, and the term that it adds to the loss.

OTTER, arXiv 2112.09445; numbers from its code (github.com/facebookresearch/OTTER).

B  pairs on this process      N  pairs of the global batch      D  embedding width
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from train_clip.errors import UserError
from train_clip.gather import gather_with_gradient
from train_clip.losses.contrastive import Pairs
from train_clip.losses.distillation import Targets, divergence, softmax_targets, transport_targets
from train_clip.models.dual_encoder import DualEncoder

MOMENTUM = 0.999
INITIAL_LOG_SCALE = 3.9
MAX_SCALE = 100.0
TARGETS: dict[str, Callable[[Tensor, Tensor], Targets]] = {
    "transport": transport_targets,
    "softmax": softmax_targets,
}

MOST_PAIRS = 16_384  # of a global batch
MATRICES = 12  # of N² float32 that one process holds at its peak (tests/training/test_teacher.py counts them)


class Teacher(nn.Module):
    """The exponential moving average of a student's weights, with a warm-up; never trained, always in eval mode.

        momentum = min(0.999, (1 + n) / (10 + n))            n  updates so far

    Args:
        student: the teacher starts as a copy.
    """

    def __init__(self, student: DualEncoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.num_updates = 0
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: DualEncoder) -> None:
        """Move towards the student; its buffers are copied."""
        momentum = min(MOMENTUM, (1 + self.num_updates) / (10 + self.num_updates))
        own: list[Tensor] = list(self.model.parameters())
        # The mean is float32 even where what it is of is kept in bfloat16.
        theirs = [parameter.detach().to(mean.dtype) for parameter, mean in zip(student.parameters(), own, strict=True)]
        torch._foreach_lerp_(own, theirs, 1 - momentum)
        for buffer, theirs_now in zip(self.model.buffers(), student.buffers(), strict=True):
            buffer.copy_(theirs_now)
        self.num_updates += 1

    def get_extra_state(self) -> dict[str, int]:
        """What the state dict holds besides tensors."""
        return {"num_updates": self.num_updates}

    def set_extra_state(self, state: Any) -> None:
        """Go on from a state dict."""
        self.num_updates = state["num_updates"]


class Distillation(nn.Module):
    """The teacher, the temperature of its own that the student has towards it, and the term.

        L = ½ (KL(Q_v ‖ P_v) + KL(Q_t ‖ P_t))

    Args:
        student: the model that is trained.
        kind: a key of ``TARGETS``.
    """

    def __init__(self, student: DualEncoder, kind: str) -> None:
        super().__init__()
        self.teacher = Teacher(student)
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self._targets = TARGETS[kind]

    def forward(self, pairs: Pairs, images: Tensor, texts: Tensor) -> Tensor:
        """The term of this process's rows: () float32 or wider.

        Args:
            pairs: of the student.
            images: (B, D) float, unit norm: the teacher's, of this process.
            texts: (B, D) float, unit norm: likewise.
        """
        targets = self._targets(gather_with_gradient(images), gather_with_gradient(texts))
        own = slice(pairs.offset, pairs.offset + len(images))
        scale = self.log_scale.exp()
        of_images = divergence(pairs.images, pairs.all_texts, scale, targets.image_to_text[own])
        of_texts = divergence(pairs.texts, pairs.all_images, scale, targets.text_to_image[own])
        return (of_images + of_texts) / 2

    def after_update(self, student: DualEncoder) -> None:
        """Clamp the temperature to [1, 100]; let the teacher follow."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(MAX_SCALE))
        self.teacher.follow(student)


def require_room(num_pairs: int) -> None:
    """Refuse a batch whose similarity matrices are too large to be held whole, as targets need them.

    Args:
        num_pairs: N.

    Raises:
        UserError: it has more than ``MOST_PAIRS``.
    """
    if num_pairs > MOST_PAIRS:
        gib = MATRICES * 4 * num_pairs**2 / 2**30
        raise UserError(
            f"Distillation holds whole matrices of similarities: {gib:,.0f} GiB on each process for a batch of "
            f"{num_pairs:,} pairs. Expected {MOST_PAIRS:,} pairs at most, over all processes. Use a smaller "
            "--batch_size, or --distillation none."
        )
