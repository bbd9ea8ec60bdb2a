"""Self-distillation: a teacher that is the running mean of its student, and the term that it adds to the loss.

OTTER, arXiv 2112.09445; numbers from its code (github.com/facebookresearch/OTTER).

B  pairs on this process      N  pairs of the global batch      D  embedding width
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from train_clip.errors import UserError
from train_clip.gather import gather_with_gradient
from train_clip.losses import Pairs
from train_clip.losses.distillation import Targets, divergence, softmax_targets, transport_targets
from train_clip.models.clip import DualEncoder
from train_clip.training.ema import RunningMean

MOMENTUM = 0.999
INITIAL_LOG_SCALE = 3.9
MAX_SCALE = 100.0
TARGETS: dict[str, Callable[[Tensor, Tensor], Targets]] = {
    "transport": transport_targets,
    "softmax": softmax_targets,
}

MOST_PAIRS = 16_384  # of a global batch
MATRICES = 12  # of N² float32 that one process holds at its peak (tests/training/test_teacher.py counts them)


class Distillation(nn.Module):
    """The teacher, the temperature of its own that the student has towards it, and the term.

        L = ½ (KL(Q_v ‖ P_v) + KL(Q_t ‖ P_t))

    Args:
        student: the model that is trained.
        kind: a key of ``TARGETS``.
    """

    def __init__(self, student: DualEncoder, kind: str) -> None:
        super().__init__()
        self.teacher = RunningMean(student, MOMENTUM)
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
