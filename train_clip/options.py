"""Every option, once: its name, type, default, help and check.

The command line adds these classes flat, the wrappers build them from keyword arguments, and a checkpoint's ``hparams``
and a run's ``config.yaml`` are their fields. Where a default is None, the model's preset or the verb decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from train_clip.errors import UserError

# What options name, and where it is found. A new one is a line here and a file of its own.
LOSSES = {"softmax": "train_clip.losses.softmax:SOFTMAX", "sigmoid": "train_clip.losses.sigmoid:SIGMOID"}
OPTIMIZERS = {
    "adamw": "train_clip.training.optimizer:build_adamw",
    "sgd": "train_clip.training.optimizer:build_sgd",
    "muon": "train_clip.training.muon:build_muon",
}
DISTILLATION = {
    "transport": "train_clip.losses.distillation:transport_targets",
    "softmax": "train_clip.losses.distillation:softmax_targets",
}

PairBy = Literal["stem", "number"]


class Check(NamedTuple):
    """What a value has to be."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Check:
    """A number from ``least`` on."""
    return Check(lambda value: value >= least, f"{least} or above")


POSITIVE = Check(lambda value: value > 0, "above 0")
PROBABILITY = Check(lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_ONE = Check(lambda value: 0 <= value < 1, "from 0 to below 1")
UP_TO_ONE = Check(lambda value: 0 < value <= 1, "above 0, up to 1")


def option(default: Any, help: str, check: Check | None = None, choices: Mapping[str, Any] | None = None) -> Any:
    """Declare an option: a dataclass field that carries its help, its check, and the table whose names it chooses."""
    return field(default=default, metadata={"help": help, "check": check, "choices": tuple(choices or ())})


@dataclass(frozen=True)
class Options:
    """A group of options; its docstring's first line is the group's heading in ``--help``.

    Raises:
        UserError: a value that cannot work; the message has the option, the value and what was expected.
    """

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, check, names = getattr(self, one.name), one.metadata["check"], self.choices(one.name)
            if value is not None and names and value not in names:
                raise UserError(f"{one.name} is {value!r}; expected one of {', '.join(names)}.")
            if value is not None and check and not check.holds(value):
                raise UserError(f"{one.name} is {value}; expected {check.expected}.")

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        """The names that an option chooses among; none for any value."""
        hint = get_type_hints(cls)[name]
        literals = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        names: tuple[str, ...] = cls.__dataclass_fields__[name].metadata["choices"]
        return names or tuple(value for kind in literals for value in get_args(kind))

    @classmethod
    def pick(cls, values: Mapping[str, Any], **rest: Any) -> Self:
        """Build the group from those of the values that are its fields; ``rest`` wins."""
        names = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names} | rest)


@dataclass(frozen=True)
class WeightOptions(Options):
    """What a file of weights may leave open, or is to be changed."""

    model_name: str | None = option(
        None, "a preset (`train-clip models` lists them) or a YAML file; default: the weights' own, or ViT-B/32"
    )
    image_size: int | None = option(
        None, "side of the square input in pixels, positions interpolated; default: the model's", at_least(1)
    )
    context_length: int | None = option(
        None, "tokens of a caption at most, start and end included; default: the model's (CLIP's: 77)", at_least(2)
    )
    activation: Literal["gelu", "quick_gelu"] | None = option(
        None, "activation of weights that do not say which they were trained with"
    )


@dataclass(frozen=True)
class ModelOptions(WeightOptions):
    """The model."""

    pretrained: str | None = option(
        None,
        "weights to start from, by OpenAI, open_clip, Hugging Face or this package: a file, a folder, hf-hub:NAME, or "
        "openai for OpenAI's of --model_name",
    )


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """Where pairs come from."""

    pairs: Path | None = option(
        None, "a table of images and captions (.csv, .tsv, .jsonl) in place of a folder, paths relative to it"
    )
    image_column: str = option("image", "the table's column of image paths")
    caption_column: str = option("caption", "the table's column of captions")
    pair_by: PairBy = option(
        "stem",
        "what the file names of a pair share: their stem (cat.jpg, cat.txt), or the number in them (image1.jpg, "
        "text1.txt)",
    )


@dataclass(frozen=True, kw_only=True)
class PairOptions(SourceOptions):
    """Where pairs come from, which are held out, and how many may be bad."""

    val_share: float = option(
        0.05, "share of the pairs held out for validation, chosen by file name; 0 for none", BELOW_ONE
    )
    max_bad: float = option(0.01, "share of the pairs that may be unreadable before the run stops", PROBABILITY)
    val_pairs: Path | None = option(None, "a table of pairs to validate on, in place of --val_share")


@dataclass(frozen=True)
class DataOptions(PairOptions):
    """The data."""

    folder: Path | None = option(None, "images and captions (.txt, one a line) that share a stem, in any subfolders")
    batch_size: int = option(
        256, "pairs of a global batch, over all processes; fewer where there are fewer pairs", at_least(2)
    )
    num_workers: int | None = option(
        None,
        "loader processes for each training process; default: one a core, at most 8, and none on a CPU",
        at_least(0),
    )
    resize_ratio: float | None = option(
        None,
        "least share of the largest square that a random crop keeps, such as 0.75; default: the paper's crop, a random "
        "square of the whole shorter side",
        UP_TO_ONE,
    )
    shuffle: bool = option(True, "permute the pairs each epoch")


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """Image augmentation, beside the random crop."""

    color_jitter: float = option(
        0.0,
        "strength of SimCLR's jitter of brightness, contrast, saturation and hue; the paper's is 1",
        Check(lambda value: 0 <= value <= 2, "from 0 (none) to 2; SimCLR's full strength is 1"),
    )
    grayscale: float = option(0.0, "probability of a grayscale image; SimCLR's is 0.2", PROBABILITY)
    horizontal_flip: float = option(
        0.0, "probability of a horizontal flip; not for captions that name sides", PROBABILITY
    )
    vertical_flip: float = option(0.0, "probability of a vertical flip", PROBABILITY)

    @property
    def changes_colours(self) -> bool:
        """Whether any pixel changes its colour in place."""
        return self.color_jitter > 0 or self.grayscale > 0

    @property
    def flips(self) -> bool:
        """Whether any image is mirrored."""
        return self.horizontal_flip > 0 or self.vertical_flip > 0


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimizer."""

    optimizer: str | None = option(
        None,
        "adamw, sgd, or muon (Muon for the matrices within the towers, AdamW for the rest); default: adamw, and sgd "
        "for two joined encoders",
        choices=OPTIMIZERS,
    )
    momentum: float | None = option(None, "of SGD, default 0.9, or of Muon, default 0.95", BELOW_ONE)
    muon_learning_rate: float | None = option(
        None, "peak learning rate of Muon's matrices; default: 8 times --learning_rate", POSITIVE
    )
    learning_rate: float | None = option(None, "peak learning rate; default: the preset's", POSITIVE)
    weight_decay: float | None = option(
        None, "weight decay of matrices and convolutions; default: the preset's", at_least(0)
    )
    betas: tuple[float, float] | None = option(
        None,
        'decay of the first and second moment, such as "[0.9, 0.98]"; default: the preset\'s',
        Check(lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
    )
    eps: float | None = option(None, "added to the root of the second moment; default: the preset's", POSITIVE)
    warmup_steps: int | None = option(
        None, "optimizer steps until the peak; default: the preset's (2,000), or a tenth of a shorter run", at_least(0)
    )
    adam_statistics: Literal["float32", "bfloat16"] = option(
        "float32",
        "precision of the optimizer state (first and second moment); bfloat16, stochastically rounded, takes half the "
        "memory",
    )
    half_weights: Literal["none", "text", "image", "both"] = option(
        "none",
        "towers whose weights are kept in bfloat16, stochastically rounded at each update; the paper's is text",
    )
    ema: float = option(
        0.0,
        "momentum of an exponential moving average (EMA) of the weights, such as 0.999, validated and saved beside "
        "them; 0 for none",
        BELOW_ONE,
    )

    @property
    def has_half_weights(self) -> bool:
        """Whether any weights are kept in bfloat16."""
        return self.half_weights != "none"

    @property
    def keeps_halves(self) -> bool:
        """Whether anything that is trained is kept in bfloat16."""
        return self.adam_statistics != "float32" or self.has_half_weights


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Options):
    """The loss, and what a step leaves out at random."""

    loss: str = option(
        "softmax",
        "softmax (CLIP's cross-entropy in both directions) or sigmoid (SigLIP)",
        choices=LOSSES,
    )
    equal_captions: Literal["keep", "mask"] = option(
        "keep",
        "whether other pairs of an equal caption stay in the loss (keep) or leave it (mask)",
    )
    mask_ratio: float = option(
        0.0, "share of each image's patches that a step drops, such as 0.5 (FLIP); for CLIP's own ViTs", BELOW_ONE
    )
    unmasked_share: float = option(
        0.05, "last part of the run's optimizer steps, which sees whole images again", PROBABILITY
    )
    stochastic_depth: float = option(
        0.0,
        "probability that the last block of each of CLIP's transformers is skipped, falling to 0 towards the first, "
        "such as 0.1",
        BELOW_ONE,
    )


@dataclass(frozen=True)
class TowerOptions(Options):
    """What is trained of the towers, and self-distillation."""

    image_learning_rate: float | None = option(
        None, "peak learning rate of the image tower; default: --learning_rate", POSITIVE
    )
    text_learning_rate: float | None = option(
        None, "peak learning rate of the text tower; default: --learning_rate", POSITIVE
    )
    lock_image: bool = option(False, "keep the image tower frozen")
    lock_text: bool = option(False, "keep the text tower frozen")
    distillation: str | None = option(
        None,
        "self-distillation from an EMA teacher by optimal transport (OTTER) or by softmax, or none; default: transport "
        "for two joined encoders, none for a CLIP",
        choices=DISTILLATION | {"none": ""},
    )
    kl_coeff: float = option(1.0, "weight of the distillation term", at_least(0))
    layer_decay: float = option(
        1.0,
        "factor on the learning rate for each layer further from a tower's output, such as 0.75; 1 for one rate",
        UP_TO_ONE,
    )

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.distillation not in (None, "none")


@dataclass(frozen=True)
class StepOptions(Options):
    """How a step is computed. The gradient stays the same."""

    minibatch_size: int = option(
        0,
        "pairs encoded at a time on one process, 0 for all at once; the gradient stays the full batch's (BatchNorm "
        "normalises chunk by chunk)",
        at_least(0),
    )
    kept_minibatches: int = option(
        0, "micro-batches whose activations are kept rather than recomputed, where memory allows", at_least(0)
    )
    gradient_checkpointing: int = option(
        0, "gradient (activation) checkpointing every so many blocks of a tower; 0 for none", at_least(0)
    )
    compile: bool = option(False, "compile the towers (torch.compile); the first steps take a minute or two")
    seed: int = option(0, "seed of the initial weights, the order of the data, crops and captions", at_least(0))


@dataclass(frozen=True)
class TrainingOptions:
    """What a module that trains has to know, group by group; flat, it is a checkpoint's ``hparams``.

    Raises:
        UserError: options that do not go together.
    """

    optimizer: OptimizerOptions = OptimizerOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    towers: TowerOptions = TowerOptions()
    augmentation: AugmentationOptions = AugmentationOptions()
    step: StepOptions = StepOptions()

    def __post_init__(self) -> None:
        optimizer, towers = self.optimizer, self.towers
        if optimizer.optimizer == "sgd" and optimizer.keeps_halves:
            raise UserError(
                f"adam_statistics is {optimizer.adam_statistics!r} and half_weights {optimizer.half_weights!r} beside "
                "optimizer 'sgd', which does not round stochastically; expected 'float32' and 'none', or 'adamw' or "
                "'muon'."
            )
        if optimizer.muon_learning_rate is not None and optimizer.optimizer != "muon":
            raise UserError(
                f"muon_learning_rate is {optimizer.muon_learning_rate} beside optimizer {optimizer.optimizer!r}; "
                "expected 'muon'."
            )
        if self.objective.mask_ratio and towers.lock_image:
            raise UserError(
                f"mask_ratio is {self.objective.mask_ratio} beside lock_image: a frozen tower sees whole images. Leave "
                "one of the two out."
            )
        for tower in ("image", "text"):
            rate, locked = getattr(towers, f"{tower}_learning_rate"), getattr(towers, f"lock_{tower}")
            if rate is not None and locked:
                raise UserError(
                    f"{tower}_learning_rate is {rate} beside lock_{tower}: a frozen tower has no learning rate. Leave "
                    f"one of the two out, a recipe's by --{tower}_learning_rate null."
                )
            if locked and optimizer.half_weights in (tower, "both"):
                raise UserError(
                    f"half_weights is {optimizer.half_weights!r} beside lock_{tower}: rounding would change a frozen "
                    "tower. Leave one of the two out."
                )

    @classmethod
    def of(cls, values: Mapping[str, Any], **defaults: Any) -> Self:
        """Build the groups from flat values; ``defaults`` stand where a value is missing or None.

        Raises:
            TypeError: a name that is no option.
        """
        groups: dict[str, Any] = {one.name: type(one.default) for one in dataclasses.fields(cls)}
        known = {one.name for group in groups.values() for one in dataclasses.fields(group)}
        if unknown := sorted(set(values) - known):
            raise TypeError(f"Unknown argument {unknown[0]!r}; expected the options of {', '.join(groups)}.")
        given = defaults | {name: value for name, value in values.items() if value is not None}
        return cls(**{name: group.pick(given) for name, group in groups.items()})

    def flat(self) -> dict[str, Any]:
        """All options by their names, plain data."""
        groups = dataclasses.asdict(self).values()
        return {name: list(v) if isinstance(v, tuple) else v for group in groups for name, v in group.items()}


@dataclass(frozen=True)
class RunOptions(Options):
    """The run."""

    epochs: int | None = option(
        None, "passes over the pairs; default: as many as --max_steps takes, or else the preset's (32 in the paper)"
    )
    output: Path | None = option(None, "a new folder for checkpoints, logs and plots; default: one below runs/")
    save_every: int | str | None = option(
        None,
        "how often to save within an epoch, in optimizer steps (500) or minutes (10m); its end always saves",
    )
    keep: int = option(2, "how many of the newest states to keep, beside the best one", at_least(1))
    resume: str | None = option(
        None,
        "a run's folder, to go on from its newest checkpoint that loads, with the run's options; or one checkpoint; or "
        "auto, for the run in --output or the newest below runs/",
    )


class TrainerOptions(dict[str, Any]):
    """Arguments of ``lightning.Trainer`` as plain values; a class is given as ``class_path`` and ``init_args``."""


def flat(*groups: Any) -> dict[str, Any]:
    """The fields of several groups by their names."""
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
