"""Which of the Trainer's precisions go with what is trained."""

from __future__ import annotations

from train_clip.errors import UserError
from train_clip.training.economy import Economy
from train_clip.training.tuning import Tuning

FLOAT32_WEIGHTS = ("32-true", "16-mixed", "bf16-mixed")
HALF = ("bf16-true", "16-true")


def require_precision(precision: str, tuning: Tuning, economy: Economy) -> None:
    """Refuse a precision in which a running mean would stand still, or half weights be another thing.

    Args:
        precision: the Trainer's.
        tuning: what is kept in bfloat16, and whether there is a running mean.
        economy: whether blocks are recomputed.

    Raises:
        UserError: it is one.
    """
    if tuning.keeps_halves and precision not in FLOAT32_WEIGHTS:
        raise UserError(
            f"--precision {precision}: --half_weights and --adam_statistics are for weights that are float32 "
            f"otherwise. Use one of {', '.join(FLOAT32_WEIGHTS)}, or leave the two options out."
        )
    if tuning.has_half_weights and economy.gradient_checkpointing and precision != "bf16-mixed":
        raise UserError(
            f"--precision {precision}: blocks that are recomputed take half weights as they are, which bf16-mixed "
            "does too, and other precisions do not. Use bf16-mixed, or one of --half_weights and "
            "--gradient_checkpointing."
        )
    if (tuning.ema or tuning.distillation != "none") and precision in HALF:
        raise UserError(
            f"--precision {precision}: in half precision a running mean stands still, and with it the teacher. Use "
            "bf16-mixed or 16-mixed, or --distillation none and --ema 0."
        )
