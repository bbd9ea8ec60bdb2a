"""The arguments of a module against those that a run began with.

What of a model is trained, and towards what.

What a step spends, of memory or of time. The gradient is the same, but for which random numbers dropout draws.

Which of the Trainer's precisions go with what is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train_clip.errors import UserError
from train_clip.options import AugmentationOptions

CHOICES = {
    "optimizer": ("adamw", "sgd", "muon"),
    "distillation": ("transport", "softmax", "none"),
    "loss": ("softmax", "sigmoid"),
    "equal_captions": ("keep", "mask"),
    "adam_statistics": ("float32", "bfloat16"),
    "half_weights": ("none", "text", "image", "both"),
}
MOMENTUM = {"muon": 0.95}  # Jordan et al. 2024, kellerjordan.github.io/posts/muon
USUAL_MOMENTUM = 0.9


@dataclass(frozen=True)
class Tuning:
    """The choices of a fine-tuning run. The defaults are those of training from scratch.

    Args:
        optimizer: ``adamw``, ``sgd``, or ``muon``: Muon for the matrices within the towers, AdamW for the rest.
        momentum: of SGD, 0.9 where None, or of Muon, 0.95.
        muon_learning_rate: of Muon's matrices at its peak; None for 8 times that of the rest.
        image_learning_rate: of the image tower at its peak; None for that of the rest. A projection and the temperature
            are the rest.
        text_learning_rate: of the text tower, likewise.
        lock_image: keep the image tower as it is, in eval mode.
        lock_text: likewise.
        distillation: a term towards targets of a teacher, the running mean of the model itself: by optimal
            ``transport`` (OTTER, arXiv 2112.09445), by ``softmax`` (arXiv 2104.08945), or ``none``.
        kl_coeff: weight of that term.
        loss: ``softmax``, the mean of both directions' cross-entropy (CLIP); or ``sigmoid``, a yes or no for each image
            with each caption (SigLIP, arXiv 2303.15343), which gives the model a ``logit_bias``.
        equal_captions: ``mask`` leaves the other pairs of an equal caption out of the denominators, or the sum.
        adam_statistics: what AdamW's two moments are kept in; ``bfloat16`` is rounded by chance (``half_adamw.py``).
        half_weights: towers whose weights are kept in bfloat16 and rounded by chance at each update; ``text`` is the
            paper's (CLIP, section 2.5). Gains and biases stay float32.
        color_jitter: of the training images; see ``AugmentationOptions`` for this and the next three.
        grayscale: likewise.
        horizontal_flip: likewise.
        vertical_flip: likewise.
        mask_ratio: share of the patches of each image that a step leaves out, by chance (FLIP, arXiv 2212.00794, which
            leaves out 0.5 or 0.75).
        unmasked_share: the last part of the run's optimizer steps, which leaves none out. FLIP's is 0.32 of an epoch
            after 32, 0.01 (its “unmasked tuning”), of a run that is far longer than most.
        stochastic_depth: share of the rows that the last block of a transformer is left out for in training, falling to
            0 towards the first (Huang et al. 2016, arXiv 1603.09382).
        layer_decay: what a tower's rate is multiplied by for each layer that a parameter lies further from the output
            (``layer_rates.py``); 1 for one rate.
        ema: momentum of a running mean of the weights, which is scored and kept beside them; 0 for none.

    Raises:
        UserError: an unknown choice, or a number that cannot work.
    """

    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    momentum: float | None = None
    muon_learning_rate: float | None = None
    image_learning_rate: float | None = None
    text_learning_rate: float | None = None
    lock_image: bool = False
    lock_text: bool = False
    distillation: Literal["transport", "softmax", "none"] = "none"
    kl_coeff: float = 1.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    equal_captions: Literal["keep", "mask"] = "keep"
    adam_statistics: Literal["float32", "bfloat16"] = "float32"
    half_weights: Literal["none", "text", "image", "both"] = "none"
    color_jitter: float = 0.0
    grayscale: float = 0.0
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    mask_ratio: float = 0.0
    unmasked_share: float = 0.05
    stochastic_depth: float = 0.0
    layer_decay: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if self.momentum is None:
            object.__setattr__(self, "momentum", MOMENTUM.get(self.optimizer, USUAL_MOMENTUM))
        assert self.momentum is not None
        for right, message in (
            (0 <= self.momentum < 1, f"momentum is {self.momentum}; expected from 0 to below 1."),
            (0 <= self.ema < 1, f"ema is {self.ema}; expected 0 for none, or a momentum below 1, such as 0.999."),
            (self.kl_coeff >= 0, f"kl_coeff is {self.kl_coeff}; expected 0 or above."),
            (0 <= self.mask_ratio < 1, f"mask_ratio is {self.mask_ratio}; expected from 0 to below 1."),
            (0 <= self.unmasked_share <= 1, f"unmasked_share is {self.unmasked_share}; expected from 0 to 1."),
            (
                0 <= self.stochastic_depth < 1,
                f"stochastic_depth is {self.stochastic_depth}; expected from 0 to below 1.",
            ),
            (0 < self.layer_decay <= 1, f"layer_decay is {self.layer_decay}; expected above 0, and 1 at most."),
            (
                not (self.mask_ratio and self.lock_image),
                f"mask_ratio is {self.mask_ratio} beside lock_image: a tower that is kept looks at whole images. Leave "
                "one of the two out.",
            ),
            (
                self.optimizer != "sgd" or not self.keeps_halves,
                f"adam_statistics is {self.adam_statistics!r} and half_weights {self.half_weights!r} beside optimizer "
                "'sgd', which does not round by chance; expected 'float32' and 'none', or 'adamw' or 'muon'.",
            ),
            (
                self.muon_learning_rate is None or (self.muon_learning_rate > 0 and self.optimizer == "muon"),
                f"muon_learning_rate is {self.muon_learning_rate} beside optimizer {self.optimizer!r}; expected above "
                "0, and 'muon'.",
            ),
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
            if locked and self.half_weights in (tower, "both"):
                raise UserError(
                    f"half_weights is {self.half_weights!r} beside lock_{tower}: rounding would change a tower that is "
                    "to be kept as it is. Leave one of the two out."
                )
        _ = self.augmentation

    @property
    def augmentation(self) -> AugmentationOptions:
        """What is done to the images of a training batch."""
        return AugmentationOptions.pick(vars(self))

    @property
    def keeps_halves(self) -> bool:
        """Whether anything that is trained is kept in bfloat16."""
        return self.adam_statistics != "float32" or self.has_half_weights

    @property
    def has_half_weights(self) -> bool:
        """Whether weights are."""
        return self.half_weights != "none"


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


@dataclass(frozen=True)
class Economy:
    """How a step is computed.

    Args:
        minibatch_size: pairs encoded at a time on one process; 0 for all at once.
        kept_minibatches: how many of these micro-batches keep their activations, and are not computed again.
        gradient_checkpointing: blocks of a tower whose activations are computed again together; 0 for none.
        compile: compile the towers with ``torch.compile``.

    Raises:
        UserError: a number that cannot work.
    """

    minibatch_size: int = 0
    kept_minibatches: int = 0
    gradient_checkpointing: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("minibatch_size", "kept_minibatches", "gradient_checkpointing"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 or above.")


PLAIN = Economy()


def take_economy(given: dict[str, Any], minibatch_size: int) -> Economy:
    """Take the fields of ``Economy`` out of a wrapper's further arguments.

    Args:
        given: the arguments; is changed.
        minibatch_size: which the wrappers name themselves.
    """
    names = [field.name for field in dataclasses.fields(Economy) if field.name in given]
    return Economy(minibatch_size, **{name: given.pop(name) for name in names})


FLOAT32_WEIGHTS = ("32-true", "16-mixed", "bf16-mixed")
HALF = ("bf16-true", "16-true")


def require_precision(precision: str, tuning: Tuning, economy: Any) -> None:
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


MOST_NAMED = 4  # arguments in a message


def require_same_arguments(own: Mapping[str, Any], kept: Mapping[str, Any], free: Collection[str]) -> None:
    """Refuse to go on with another model, or with another way of training it.

    Args:
        own: a module's ``hparams``.
        kept: those that the run began with.
        free: names of what may differ.

    Raises:
        UserError: something else differs; the message has both values.
    """
    now, then = (
        _flat({name: value for name, value in arguments.items() if name not in free}) for arguments in (own, kept)
    )
    differ = [name for name in now | then if now.get(name) != then.get(name)]
    if differ:
        found = "; ".join(f"{name} {now.get(name)}, was {then.get(name)}" for name in differ[:MOST_NAMED])
        raise UserError(
            f"The run began with another model or optimizer (found {found}), and its checkpoint holds their state. "
            "Give the earlier values, or leave them out; to train with others begin a new run."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
