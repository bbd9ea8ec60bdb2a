"""The exponential moving average (EMA) of a model's weights, for ``--ema`` and for self-distillation."""

import copy
import math
from pkgutil import resolve_name

import torch
from typing_extensions import override

from train_clip import errors, gather
from train_clip.losses import Pairs, distillation
from train_clip.models.clip import DualEncoder
from train_clip.options import DISTILLATION


class WeightsEMA(torch.nn.Module):
    """An EMA of a model's weights with a warmup, after n updates; never trained, always in eval mode.

        m = min(momentum, (1 + n) / (10 + n))            ema ← m · ema + (1 - m) · model

    (OTTER's code, github.com/facebookresearch/OTTER.) Float32 even where the model is kept in bfloat16. Buffers are
    copied; what is frozen when the EMA is made is held once, for both.
    """

    def __init__(self, model: DualEncoder, momentum: float) -> None:
        super().__init__()
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, frozen).requires_grad_(False)
        self.momentum = momentum
        self.num_updates = 0
        self.eval()

    @override
    def train(self, mode: bool = True) -> "WeightsEMA":
        return super().train(False)

    @torch.no_grad()
    def follow(self, model: DualEncoder) -> None:
        """Move toward the model, after an update."""
        share = 1 - min(self.momentum, (1 + self.num_updates) / (10 + self.num_updates))
        own: list[torch.Tensor] = []
        theirs = []
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
    def set_extra_state(self, state: dict[str, int]) -> None:
        self.num_updates = state["num_updates"]


def ema_figure(figure: str) -> str:
    """The name of a validation's figure, ``val/…``, where it is the EMA's; or of another evaluation's."""
    return figure.replace("/", "_ema/", 1)


TEACHER_MOMENTUM = 0.999
INITIAL_LOG_SCALE = 3.9
MAX_SCALE = 100.0
MOST_PAIRS = 16_384  # of a global batch
MATRICES = 12  # of N² float32 that one process holds at its peak (tests/training/test_teacher.py counts them)


class Distillation(torch.nn.Module):
    """The teacher, the student's temperature toward it, and the term that it adds to the loss.

    L = ½ (KL(Q_v ‖ P_v) + KL(Q_t ‖ P_t))        Q: one of ``options.DISTILLATION``
    """

    def __init__(self, student: DualEncoder, kind: str) -> None:
        super().__init__()
        self.teacher = WeightsEMA(student, TEACHER_MOMENTUM)
        self.log_scale = torch.nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self._targets = resolve_name(DISTILLATION[kind])

    @override
    def forward(self, pairs: Pairs, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        # The student's pairs and the teacher's embeddings, (B, D) and of unit norm, of this process → () float32.
        require_room(len(pairs.all_images))
        targets = self._targets(gather.gather_with_gradient(images), gather.gather_with_gradient(texts))
        own = slice(pairs.offset, pairs.offset + len(images))
        scale = self.log_scale.exp()
        of_images = distillation.divergence(pairs.images, pairs.all_texts, scale, targets.image_to_text[own])
        of_texts = distillation.divergence(pairs.texts, pairs.all_images, scale, targets.text_to_image[own])
        return (of_images + of_texts) / 2

    def after_update(self, student: DualEncoder) -> None:
        """Clamp the temperature to [1, 100]; let the teacher follow."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(MAX_SCALE))
        self.teacher.follow(student)


def require_room(num_pairs: int) -> None:
    """Refuse a global batch of more than ``MOST_PAIRS``: targets need its matrices of similarities whole."""
    if num_pairs > MOST_PAIRS:
        gib = MATRICES * 4 * num_pairs**2 / 2**30
        raise errors.UserError(
            f"Distillation needs whole similarity matrices: {gib:,.0f} GiB on each process for a batch of "
            f"{num_pairs:,} pairs. Expected {MOST_PAIRS:,} pairs at most, over all processes. Use a smaller "
            "--batch_size, or --distillation none."
        )
