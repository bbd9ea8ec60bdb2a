"""Every option, once: its name, type, default, help and check.

The command line adds these classes flat, the wrappers build them from keyword arguments, and a checkpoint's ``hparams``
and a run's ``config.yaml`` are their fields. Where a default is None, the model's preset or the verb decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from train_clip.errors import UsageError

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

MOMENTUM = {"muon": 0.95}  # Jordan et al. 2024, kellerjordan.github.io/posts/muon; of others 0.9
PairBy = Literal["stem", "number"]


class Check(NamedTuple):
    """What a value has to be."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Check:
    """A number from ``least`` on."""
    return Check(lambda value: value >= least, f"{least} or above")


POSITIVE = Check(lambda value: value > 0, "above 0")
RATE_OF_TOWER = POSITIVE._replace(expected="above 0; to freeze a tower: lock_image, lock_text")
PROBABILITY = Check(lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_ONE = Check(lambda value: 0 <= value < 1, "from 0 to below 1")
UP_TO_ONE = Check(lambda value: 0 < value <= 1, "above 0, up to 1")
UP_TO_TWO = Check(lambda value: 0 <= value <= 2, "from 0 (none) to 2; SimCLR's full strength is 1")
BETAS = Check(lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers from 0 to below 1")


def option(default: Any, help: str, check: Check | None = None) -> Any:
    """Declare an option: a dataclass field that carries its help and its check."""
    return field(default=default, metadata={"help": help, "check": check})


@dataclass(frozen=True)
class Options:
    """A group of options; its docstring is the group's heading in ``--help``. A value that cannot work is refused."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, check = getattr(self, one.name), one.metadata["check"]
            if value is None:
                continue
            kinds = (one.type, *get_args(one.type))
            names = [name for kind in kinds for name in get_args(kind) if isinstance(name, str)]
            if names and value not in names:
                raise UsageError(f"{one.name} is {value!r}; expected one of {', '.join(names)}.")
            if check and not check.holds(value):
                raise UsageError(f"{one.name} is {value}; expected {check.expected}.")

    @classmethod
    def pick(cls, values: dict[str, Any]) -> Self:
        """Build the group from those of the values that are its fields."""
        return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})


@dataclass(frozen=True)
class WeightOptions(Options):
    """What a file of weights may leave open, or is to be changed."""

    model_name: str | None = option(None, "a preset or a YAML file; default: ViT-B/32, or the weights' own")
    image_size: int | None = option(None, "input size in pixels; default: the model's", at_least(1))
    context_length: int | None = option(None, "tokens per caption at most; default: the model's", at_least(2))
    activation: Literal["gelu", "quick_gelu"] | None = option(None, "of the weights; default: as their file says")


@dataclass(frozen=True)
class ModelOptions(WeightOptions):
    """The model."""

    pretrained: str | None = option(
        None,
        "weights to start from: a file, a folder, hf-hub:NAME, or openai for those of --model_name; default: random "
        "initialization",
    )


@dataclass(frozen=True)
class LoRAOptions(Options):
    """LoRA: small matrices beside the frozen layers of --pretrained."""

    lora: int | None = option(None, "rank of LoRA; default: none, all weights are trained", at_least(1))
    lora_alpha: float | None = option(
        None, "LoRA's product is scaled by alpha / rank; default: the rank, for a scale of 1", POSITIVE
    )
    lora_towers: Literal["both", "image", "text"] = option("both", "towers that have LoRA")
    lora_layers: list[int] | None = option(
        None, 'blocks that have LoRA, counted from 0, such as "[9, 10, 11]"; default: all'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is None and (self.lora_alpha, self.lora_towers, self.lora_layers) != (None, "both", None):
            raise UsageError("lora_alpha, lora_towers and lora_layers are of LoRA. Give its rank too: --lora 8.")

    @property
    def alpha(self) -> float:
        """The alpha that is asked for, or the rank, as LoRA's paper has it (arXiv 2106.09685, section 4.1)."""
        return self.lora_alpha or self.lora or 1.0

    @property
    def scale(self) -> float:
        """Factor of LoRA's product, alpha / rank."""
        return self.alpha / (self.lora or 1)


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """Where pairs come from."""

    pairs: Path | None = option(None, "table (.csv, .tsv, .jsonl) of pairs instead of --folder, paths relative to it")
    image_column: str = option("image", "the table's column of image paths")
    caption_column: str = option("caption", "the table's column of captions")
    shards: str | None = option(
        None,
        "WebDataset shards instead of --folder: tars by path, folder, glob, {000..099} or address (s3://, gs://, "
        "https://); several as A::B, each with @WEIGHT, how often it is in an epoch",
    )
    dataset: str | None = option(
        None,
        "data set of Hugging Face instead of --folder: NAME or NAME:SPLIT, a folder, or Parquet files with images",
    )
    pair_by: PairBy = option("stem", "match files by stem (cat.jpg, cat.txt) or number (image1.jpg, text1.txt)")


@dataclass(frozen=True, kw_only=True)
class PairOptions(SourceOptions):
    """Where pairs come from, which are held out, and how many may be bad."""

    val_share: float = option(0.05, "fraction of the pairs held out for validation, chosen by file name", BELOW_ONE)
    max_bad: float = option(0.01, "fraction of the pairs that may be unreadable before the run stops", PROBABILITY)
    val_pairs: Path | None = option(None, "a table of validation pairs instead of --val_share")


@dataclass(frozen=True)
class DataOptions(PairOptions):
    """The data."""

    folder: Path | None = option(
        None, "images and captions that share a stem (cat.jpg, cat.txt), one caption per line; includes subfolders"
    )
    batch_size: int = option(256, "pairs per batch over all processes (global batch), at most all pairs", at_least(2))
    num_workers: int | None = option(
        None,
        "data loading processes per training process; default: one per core, at most 8, or 0 when training on a CPU",
        at_least(0),
    )
    resize_ratio: float | None = option(
        None,
        "smallest random crop as a fraction of the largest square's area, such as 0.75; default: the paper's crop",
        UP_TO_ONE,
    )
    shuffle: bool = option(True, "shuffle the pairs each epoch")


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """Image augmentation, besides the random crop."""

    color_jitter: float = option(
        0.0, "strength of color jitter (brightness, contrast, saturation, hue), relative to SimCLR's", UP_TO_TWO
    )
    grayscale: float = option(0.0, "probability of converting an image to grayscale; SimCLR's is 0.2", PROBABILITY)
    horizontal_flip: float = option(0.0, "probability of a horizontal flip; not if captions name sides", PROBABILITY)
    vertical_flip: float = option(0.0, "probability of a vertical flip", PROBABILITY)

    @property
    def changes_colours(self) -> bool:
        """Whether any pixel changes its colour in place."""
        return self.color_jitter > 0 or self.grayscale > 0


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimizer."""

    optimizer: Literal[*OPTIMIZERS] | None = option(  # type: ignore[valid-type]
        None, "muon updates the towers' matrices, AdamW all else; default: adamw, or sgd for two encoders"
    )
    momentum: float | None = option(None, "momentum of SGD (default: 0.9) or Muon (default: 0.95)", BELOW_ONE)
    muon_learning_rate: float | None = option(None, "Muon's peak learning rate; default: 8 × --learning_rate", POSITIVE)
    learning_rate: float | None = option(None, "peak learning rate; default: the preset's", POSITIVE)
    weight_decay: float | None = option(None, "decay of matrices and convolutions; default: the preset's", at_least(0))
    betas: tuple[float, float] | None = option(
        None, 'decay rates of the first and second moment, such as "[0.9, 0.98]"; default: the preset\'s', BETAS
    )
    eps: float | None = option(None, "epsilon, added to the root of the second moment; default: the preset's", POSITIVE)
    warmup_steps: int | None = option(
        None, "linear warm-up in optimizer steps; default: the preset's, or a tenth of a short run", at_least(0)
    )
    adam_statistics: Literal["float32", "bfloat16"] = option(
        "float32", "precision of the optimizer state (first and second moment); bfloat16 uses stochastic rounding"
    )
    half_weights: Literal["none", "text", "image", "both"] = option(
        "none", "towers whose weights are kept in bfloat16 by stochastic rounding; the paper's is text"
    )
    ema: float = option(0.0, "momentum of an exponential moving average (EMA) of weights, such as 0.999", BELOW_ONE)

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
    """The loss and regularization."""

    loss: Literal[*LOSSES] | None = option(  # type: ignore[valid-type]
        None, "softmax (CLIP: cross-entropy in both directions) or sigmoid; default: sigmoid for SigLIP, else softmax"
    )
    equal_captions: Literal["keep", "mask"] = option("keep", "keep pairs of equal captions as negatives, or mask them")
    mask_ratio: float = option(0.0, "fraction of patches dropped in a step (FLIP: 0.5); CLIP's ViTs only", BELOW_ONE)
    unmasked_share: float = option(0.05, "final fraction of the run without --mask_ratio", PROBABILITY)
    stochastic_depth: float = option(
        0.0, "drop probability of the last block of CLIP's transformers, decreasing to 0 at the first", BELOW_ONE
    )


@dataclass(frozen=True)
class TowerOptions(Options):
    """The towers (image and text encoder) and self-distillation."""

    image_learning_rate: float | None = option(
        None, "peak, of the image tower; default: --learning_rate", RATE_OF_TOWER
    )
    text_learning_rate: float | None = option(None, "peak, of the text tower; default: --learning_rate", RATE_OF_TOWER)
    lock_image: bool = option(False, "freeze the image tower")
    lock_text: bool = option(False, "freeze the text tower")
    distillation: Literal[*DISTILLATION, "none"] | None = option(  # type: ignore[valid-type]
        None,
        "targets of an EMA teacher: optimal transport (OTTER) or softmax; default: transport for two encoders",
    )
    kl_coeff: float = option(1.0, "weight of the distillation loss", at_least(0))
    layer_decay: float = option(
        1.0, "layer-wise learning rate decay: factor per layer below a tower's output", UP_TO_ONE
    )

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.distillation not in (None, "none")


@dataclass(frozen=True)
class StepOptions(Options):
    """Memory and speed, with the same gradient; seed."""

    minibatch_size: int = option(
        0, "pairs encoded at a time per process (BatchNorm per minibatch); 0: all", at_least(0)
    )
    kept_minibatches: int = option(0, "minibatches whose activations are kept, not recomputed", at_least(0))
    gradient_checkpointing: int = option(0, "gradient (activation) checkpointing every N blocks; 0: none", at_least(0))
    compile: bool = option(False, "compile the towers (torch.compile); the first steps take a minute or two")
    seed: int = option(0, "random seed of the initial weights, the order of the data, crops and captions", at_least(0))


@dataclass(frozen=True)
class TrainingOptions:
    """What a module that trains has to know, group by group; flat, it is a checkpoint's ``hparams``."""

    optimizer: OptimizerOptions = OptimizerOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    towers: TowerOptions = TowerOptions()
    augmentation: AugmentationOptions = AugmentationOptions()
    step: StepOptions = StepOptions()

    def __post_init__(self) -> None:
        optimizer, halves = self.optimizer, self.optimizer.half_weights
        if optimizer.optimizer == "sgd" and optimizer.keeps_halves:
            raise UsageError(
                f"adam_statistics is {optimizer.adam_statistics!r} and half_weights {halves!r} beside optimizer 'sgd', "
                "which does not round stochastically; expected 'float32' and 'none', or 'adamw' or 'muon'."
            )
        if optimizer.muon_learning_rate is not None and optimizer.optimizer != "muon":
            raise UsageError(
                f"muon_learning_rate is {optimizer.muon_learning_rate} beside optimizer {optimizer.optimizer!r}; "
                "expected 'muon'."
            )
        for tower in ("image", "text"):
            idle = {
                f"{tower}_learning_rate": getattr(self.towers, f"{tower}_learning_rate"),
                "half_weights": halves in (tower, "both") and halves,
                "mask_ratio": tower == "image" and self.objective.mask_ratio,
            }
            for name, value in idle.items():
                if value and getattr(self.towers, f"lock_{tower}"):
                    raise UsageError(
                        f"{name} is {value!r} beside lock_{tower}: a frozen tower has no learning rate, is not rounded "
                        "and sees whole images. Leave one of the two out, a recipe's learning rate by null."
                    )

    @classmethod
    def groups(cls) -> dict[str, Any]:
        """The groups by their names."""
        return {one.name: one.type for one in fields(cls)}

    @classmethod
    def pick(cls, values: dict[str, Any]) -> Self:
        """Build the groups from those of flat values that are their fields."""
        return cls(**{name: group.pick(values) for name, group in cls.groups().items()})

    @classmethod
    def of(cls, values: dict[str, Any], **defaults: Any) -> Self:
        """Build the groups from flat values; ``defaults``, and a momentum, stand where a value is missing or None."""
        if unknown := sorted(set(values) - set(cls().flat())):
            raise TypeError(f"Unknown argument {unknown[0]!r}; expected the options of {', '.join(cls.groups())}.")
        given = defaults | {name: value for name, value in values.items() if value is not None}
        given = {"momentum": MOMENTUM.get(given.get("optimizer", ""), 0.9)} | given
        return cls.pick({name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def flat(self) -> dict[str, Any]:
        """All options by their names, plain data."""
        return flat(*vars(self).values())


@dataclass(frozen=True)
class RunOptions(Options):
    """The run."""

    epochs: int | None = option(None, "passes over the pairs; default: the preset's, or as --max_steps says")
    output: Path | None = option(None, "a new folder for checkpoints, logs and plots; default: runs/MODEL-DATE-TIME")
    save_every: int | str | None = option(
        None, "also save within an epoch, every N optimizer steps (500) or minutes (10m); default: at its end"
    )
    evaluate: list[str] | str | None = option(
        None, "also score NAME=SOURCE: folder, table, or YAML file of `evaluate`'s options; repeatable; default: none"
    )
    evaluate_every: int | str = option(
        1, 'how often to: epochs (2) or optimizer steps ("500 steps"), and after the last of --epochs or --max_steps'
    )
    best_by: str | None = option(
        None,
        "figure that best.ckpt is best at, such as NAME/top1; default: val/mean_recall, for prompts val/loss",
    )
    keep: int = option(2, "number of the newest checkpoints to keep, besides the best", at_least(1))
    resume: str | None = option(
        None,
        "continue a run with its own options: its folder, a checkpoint, or auto (--output, or the newest in runs/)",
    )


class TrainerOptions(dict[str, Any]):
    """Arguments of ``lightning.Trainer`` as plain values; a class is given as ``class_path`` and ``init_args``."""


def flat(*groups: Any) -> dict[str, Any]:
    """The fields of several groups by their names, plain data but for paths."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for group in groups
        for name, value in vars(group).items()
    }
