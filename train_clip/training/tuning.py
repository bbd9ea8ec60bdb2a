"""What of a model is trained, and towards what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from train_clip.errors import UserError

CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "distillation": ("transport", "softmax", "none"),
    "equal_captions": ("keep", "mask"),
}


@dataclass(frozen=True)
class Tuning:
    """The choices of a fine-tuning run. The defaults are those of training from scratch.

    Args:
        optimizer: ``adamw`` or ``sgd``.
        momentum: of SGD.
        image_learning_rate: of the image tower at its peak; None for that of the rest. A projection and the temperature
            are the rest.
        text_learning_rate: of the text tower, likewise.
        lock_image: keep the image tower as it is, in eval mode.
        lock_text: likewise.
        distillation: a term towards targets of a teacher, the running mean of the model itself: by optimal
            ``transport`` (OTTER, arXiv 2112.09445), by ``softmax`` (arXiv 2104.08945), or ``none``.
        kl_coeff: weight of that term.
        equal_captions: ``mask`` leaves the other pairs of an equal caption out of the denominators.

    Raises:
        UserError: an unknown choice, or a number that cannot work.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    image_learning_rate: float | None = None
    text_learning_rate: float | None = None
    lock_image: bool = False
    lock_text: bool = False
    distillation: Literal["transport", "softmax", "none"] = "none"
    kl_coeff: float = 1.0
    equal_captions: Literal["keep", "mask"] = "keep"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        for right, message in (
            (0 <= self.momentum < 1, f"momentum is {self.momentum}; expected from 0 to below 1."),
            (self.kl_coeff >= 0, f"kl_coeff is {self.kl_coeff}; expected 0 or above."),
        ):
            if not right:
                raise UserError(message)
        for tower in ("image", "text"):
            rate, locked = getattr(self, f"{tower}_learning_rate"), getattr(self, f"lock_{tower}")
            if rate is not None and rate <= 0:
                raise UserError(f"{tower}_learning_rate is {rate}; expected above 0. To keep the tower: lock_{tower}.")
            if rate is not None and locked:
                raise UserError(
                    f"{tower}_learning_rate is {rate} beside lock_{tower}: a tower that is kept has no rate. Leave one "
                    f"of the two out, a recipe's by --{tower}_learning_rate null."
                )


def make_tuning(given: dict[str, Any], **defaults: Any) -> Tuning:
    """Make the choices out of a wrapper's further arguments.

    Args:
        given: fields of ``Tuning``, by their names.
        defaults: those that differ from ``Tuning``'s.

    Raises:
        TypeError: a name that is none of its fields.
        UserError: as ``Tuning``.
    """
    if unknown := sorted(set(given) - set(Tuning.__dataclass_fields__)):
        raise TypeError(f"Unknown argument {unknown[0]!r}; beside those named it takes those of Tuning.")
    return Tuning(**(defaults | given))
