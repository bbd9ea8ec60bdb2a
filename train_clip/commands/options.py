"""The options of the training verbs, each defined once. Field names are the command line's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from train_clip.errors import UserError
from train_clip.options import PairBy, SourceOptions
from train_clip.options import WeightOptions as Choices


@dataclass(frozen=True)
class WeightOptions:
    """What a file of weights may leave open, or is to be changed.

    Args:
        model_name: a preset (`train-clip models` lists them) or a YAML file of your own, if not that of the weights
        image_size: side of the square input in pixels, if not the model's own; positions of weights are interpolated
        context_length: tokens of a caption at most, if not the model's own; likewise
        activation: of a model whose weights do not say which they were trained with
    """

    model_name: str | None = None
    image_size: int | None = None
    context_length: int | None = None
    activation: Literal["gelu", "quick_gelu"] | None = None

    @property
    def choices(self) -> Choices:
        """What the user has chosen."""
        return Choices(self.model_name, self.image_size, self.context_length, self.activation)


@dataclass(frozen=True)
class ModelOptions(WeightOptions):
    """The model.

    Args:
        pretrained: weights to begin with, by OpenAI, open_clip, Hugging Face or this package: a file, a folder,
            hf-hub:NAME, or openai for OpenAI's of --model_name
    """

    pretrained: str | None = None


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Where pairs are taken from.

    Args:
        pairs: a table of images and captions (.csv, .tsv, .jsonl) in place of a folder, paths relative to it
        image_column: the table's column of image paths
        caption_column: the table's column of captions
        pair_by: what the names of a folder's pair share: their stem (cat.jpg, cat.txt), or, never by itself, the number
            in them (image1.jpg, text1.txt)
    """

    pairs: Path | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    pair_by: PairBy = "stem"

    @property
    def source(self) -> SourceOptions:
        """The same, checked."""
        return SourceOptions.pick(vars(self))


@dataclass(frozen=True)
class DataOptions(TableOptions):
    """The data.

    Args:
        folder: images and captions (.txt, one a line) that share a stem, in any subfolders
        batch_size: pairs of a batch over all processes; fewer where there are fewer pairs
        num_workers: loader processes for each training process, if not one a core, 8 at most, and none on a CPU
        resize_ratio: crop squares of at least this share of the largest one, such as 0.75, and resize them; without it
            the paper's crop, a random square of the whole shorter side
        shuffle: whether to permute the pairs each epoch
        val_share: share of the pairs held out for validation, chosen by file name; 0 for none
        max_bad: share of the pairs that may turn out to be unreadable before the run stops
        val_pairs: a table of pairs to validate on, in place of --val_share
    """

    folder: Path | None = None
    batch_size: int = 256
    num_workers: int | None = None
    resize_ratio: float | None = None
    shuffle: bool = True
    val_share: float = 0.05
    max_bad: float = 0.01
    val_pairs: Path | None = None


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """What is done to the images of a training batch, beside their crop.

    Args:
        color_jitter: strength of SimCLR's changes of brightness, contrast, saturation and hue; its own is 1
        grayscale: share of the images without colour; SimCLR's is 0.2
        horizontal_flip: share of the images whose left and right change places; not for captions that name sides
        vertical_flip: share of the images whose top and bottom change places
    """

    color_jitter: float = 0.0
    grayscale: float = 0.0
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer.

    Args:
        optimizer: adamw; sgd; or muon, which is Muon for the matrices within the towers and AdamW for the rest. If not
            told, sgd for `finetune` on two encoders, and adamw
        momentum: of SGD, 0.9 if not told, or of Muon, 0.95
        muon_learning_rate: of Muon's matrices at its peak, if not 8 times that of the rest
        learning_rate: at its peak, if not the model's own
        weight_decay: on matrices and convolutions, if not the model's own
        betas: decay of both moments, such as "[0.9, 0.98]", if not the model's own
        eps: added to the root of the second moment, if not the model's own
        warmup_steps: optimizer steps until the peak, if not the model's own (2,000), or a tenth of a run that is short
        adam_statistics: what both moments are kept in; bfloat16, rounded by chance, takes half the memory
        half_weights: towers whose weights are kept in bfloat16, rounded by chance at each update; text is the paper's
    """

    optimizer: Literal["adamw", "sgd", "muon"] | None = None
    momentum: float | None = None
    muon_learning_rate: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    warmup_steps: int | None = None
    adam_statistics: Literal["float32", "bfloat16"] = "float32"
    half_weights: Literal["none", "text", "image", "both"] = "none"


@dataclass(frozen=True, kw_only=True)
class ChanceOptions:
    """What a step leaves out by chance.

    Args:
        mask_ratio: share of the patches of each image that a step leaves out, such as 0.5; for CLIP's own vision
            transformers
        unmasked_share: the last part of the run's optimizer steps, which looks at whole images again
        stochastic_depth: share of the rows that the last block of each of CLIP's transformers is left out for, falling
            to 0 towards the first, such as 0.1
    """

    mask_ratio: float = 0.0
    unmasked_share: float = 0.05
    stochastic_depth: float = 0.0


@dataclass(frozen=True)
class ObjectiveOptions(ChanceOptions):
    """What is minimised.

    Args:
        equal_captions: whether the other pairs of an equal caption keep their place in the loss, or leave it (mask)
        loss: softmax, CLIP's cross-entropy in both directions, or sigmoid, a yes or no for each image with each caption
            (SigLIP)
    """

    equal_captions: Literal["keep", "mask"] = "keep"
    loss: Literal["softmax", "sigmoid"] = "softmax"


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    Args:
        minibatch_size: pairs encoded at a time on one process, 0 for all at once; the gradient stays the full batch's
            (BatchNorm normalises chunk by chunk)
        kept_minibatches: how many of these micro-batches keep their activations, where there is memory for more than
            one, and are not computed a second time
        gradient_checkpointing: blocks of a tower whose activations are computed again together in the backward pass; 1
            for each block by itself, 0 for none
        compile: compile the towers (torch.compile); the first steps take a minute or two
    """

    minibatch_size: int = 0
    kept_minibatches: int = 0
    gradient_checkpointing: int = 0
    compile: bool = False

    @property
    def step(self) -> dict[str, Any]:
        """These options alone, as the wrappers take them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(StepOptions)}


@dataclass(frozen=True)
class RunOptions(StepOptions):
    """The run.

    Args:
        epochs: passes over the pairs, if not as many as --max_steps takes, or else the model's own (32 in the paper)
        seed: decides the weights at the start, the order of the data, crops and captions
        output: a new folder for checkpoints, logs and plots, if not one below runs/
        save_every: how often to save within an epoch, in optimizer steps (500) or minutes (10m); an epoch's end is
            always saved
        keep: how many of the newest states to keep, beside the best one
        resume: a run's folder, to go on from the newest of its checkpoints that loads, with the options that it began
            with; or one checkpoint; or auto, for the run in --output or the newest below runs/
        ema: momentum of a running mean of the weights, such as 0.999, which is validated and saved beside them; 0 for
            none
    """

    epochs: int | None = None
    seed: int = 0
    output: Path | None = None
    save_every: int | str | None = None
    keep: int = 2
    resume: str | None = None
    ema: float = 0.0


class TrainerOptions(dict[str, Any]):
    """Arguments of ``lightning.Trainer`` as plain values; a class is given as ``class_path`` and ``init_args``."""


# Arguments of the Trainer that have another name here: --epochs and --output.
OWN_TRAINER_OPTIONS = ("max_epochs", "default_root_dir")

T = TypeVar("T")


def require_least(**numbers: tuple[int, int]) -> None:
    """Refuse numbers that are too small.

    Args:
        numbers: by the option's name, its value and the least that it may be.

    Raises:
        UserError: one is below.
    """
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f"--{name} {value}: expected {least} or above.")


def select(kind: type[T], values: dict[str, Any], **rest: Any) -> T:
    """Build an options dataclass from those of the values that are its fields; ``rest`` wins."""
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in values.items() if key in fields} | rest)


def resolve_optimizer(options: OptimizerOptions, arguments: Mapping[str, Any]) -> OptimizerOptions:
    """The options with what they leave open, as a run's ``config.yaml`` keeps them.

    A momentum that nobody asked for stays open, so that another optimizer beside that file has its own.

    Args:
        options: as they were given.
        arguments: the module's ``hparams``.
    """
    return dataclasses.replace(select(OptimizerOptions, dict(arguments)), momentum=options.momentum)
