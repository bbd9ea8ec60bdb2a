"""Fine-tune: two pretrained encoders, or a trained CLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train_clip.commands.options import (
    AugmentationOptions,
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RunOptions,
    TrainerOptions,
    resolve_optimizer,
    select,
)
from train_clip.commands.run import Job, begin, train_job
from train_clip.commands.run_folder import Resumption
from train_clip.commands.train import pretrained_weights, require_same_start
from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders.sources import OWN, load_image_encoder, load_text_encoder
from train_clip.encoders.tokenizer import load_tokenizer
from train_clip.encoders.wrapper import EPOCHS, CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.load import rebuilt, retrained
from train_clip.training.module import ContrastiveModule

# What differs for a trained CLIP: rate and epochs are those of github.com/mlfoundations/wise-ft (README), for ViT-B/32
# and batches of 512; the rest is that of training it from scratch.
OF_CLIP = {"optimizer": "adamw", "distillation": "none", "learning_rate": 3e-5, "weight_decay": 0.0}
OF_ENCODERS = {"optimizer": "sgd", "distillation": "transport"}
# SGD's rate is far too high for the others (the rate of benchmarks/distillation.py in docs/finetuning.md).
OF_OPTIMIZER = {"adamw": {"learning_rate": 3e-4}, "muon": {"learning_rate": 3e-4}}
# What two encoders are joined of where nothing else is asked for.
ENCODERS = {
    "image_encoder": "hf:microsoft/resnet-50",
    "text_encoder": "hf:johngiorgi/declutr-sci-base",
    "avg_word_embs": True,
}


@dataclass(frozen=True)
class StartOptions(ModelOptions):
    """What training starts from.

    Args:
        image_encoder: hf:NAME or hf:FOLDER, timm:NAME, torchvision:NAME, train-clip:CHECKPOINT; without --pretrained
            hf:microsoft/resnet-50, if not told
        text_encoder: hf:NAME or hf:FOLDER, train-clip:CHECKPOINT; hf:johngiorgi/declutr-sci-base, if not told
        avg_word_embs: whether a caption is the mean over its tokens (true, if not told), or what the text encoder pools
            by itself (false)
    """

    image_encoder: str | None = None
    text_encoder: str | None = None
    avg_word_embs: bool | None = None


@dataclass(frozen=True)
class TuningOptions(ObjectiveOptions):
    """What is trained, and towards what.

    Args:
        image_learning_rate: of the image tower, if not that of the rest
        text_learning_rate: of the text tower, if not that of the rest
        lock_image: keep the image tower as it is
        lock_text: keep the text tower as it is
        distillation: a term towards what a running mean of the model makes of the batch, by optimal transport or by
            softmax; transport for two encoders and none for a trained CLIP, if not told
        kl_coeff: weight of that term
        layer_decay: what the rate is multiplied by for each layer that lies further from a tower's output, such as
            0.75; 1 for one rate
    """

    image_learning_rate: float | None = None
    text_learning_rate: float | None = None
    lock_image: bool = False
    lock_text: bool = False
    distillation: Literal["transport", "softmax", "none"] | None = None
    kl_coeff: float = 1.0
    layer_decay: float = 1.0


def finetune(  # noqa: PLR0913, each is a group of options
    start: StartOptions,
    data: DataOptions,
    augmentation: AugmentationOptions,
    optimizer: OptimizerOptions,
    tuning: TuningOptions,
    run: RunOptions,
    trainer: TrainerOptions,
) -> Path:
    """Fine-tune two pretrained encoders, self-distilled, or a trained CLIP on pairs of your own.

    Args:
        start: the encoders, or the trained model.
        data: the data.
        augmentation: of its images.
        optimizer: its numbers.
        tuning: what is trained, and towards what.
        run: length, seed and folder of the run.
        trainer: arguments of Lightning's Trainer.

    Returns:
        The run's folder.
    """
    resumed = begin(run)
    usual = (
        OF_CLIP if start.pretrained is not None else OF_ENCODERS | OF_OPTIMIZER.get(optimizer.optimizer or "sgd", {})
    )
    given = dataclasses.asdict(optimizer) | dataclasses.asdict(tuning) | dataclasses.asdict(augmentation)
    how = usual | {name: value for name, value in given.items() if value is not None}
    how |= run.step | {"seed": run.seed, "ema": run.ema}
    if resumed is not None:
        start = _require_same(start, resumed)
        module: ContrastiveModule = rebuilt(resumed.state, resumed.checkpoint, **how)
    elif start.pretrained is None:
        start = _with_encoders(start, ENCODERS)
        module = _join(start, how)
    else:
        module, source = _train_on(start, how)
        start = dataclasses.replace(start, pretrained=source)
    pairs = TextImageDataModule(
        image_size=module.model.image_size, custom_tokenizer=module.tokenizer, seed=run.seed, **dataclasses.asdict(data)
    )

    def options(_: Path) -> tuple[object, ...]:
        """What the run's ``config.yaml`` keeps."""
        resolved = resolve_optimizer(optimizer, module.hparams), select(TuningOptions, dict(module.hparams))
        return start, data, augmentation, *resolved

    return train_job(Job("finetune", module, pairs, EPOCHS, options), run, trainer, resumed)


def _with_encoders(start: StartOptions, others: Mapping[str, Any]) -> StartOptions:
    """The options with what they leave open of two encoders."""
    return dataclasses.replace(start, **{name: others[name] for name in others if getattr(start, name) is None})


def _train_on(start: StartOptions, how: Mapping[str, Any]) -> tuple[ContrastiveModule, str]:
    """The whole model that the options name, and where it was found."""
    for name in ENCODERS:
        if getattr(start, name) is not None:
            raise UserError(
                f"--{name}: is for two encoders that are to be joined; --pretrained {start.pretrained} is a whole "
                "model, with encoders of its own. Leave one of the two options out."
            )
    weights = pretrained_weights(start)
    assert weights is not None
    return retrained(weights, **how), weights.source


def _join(start: StartOptions, how: Mapping[str, Any]) -> CustomCLIPWrapper:
    """The two encoders, with the tokenizer of the text encoder and a projection where their widths differ."""
    for name in ("model_name", "activation", "image_size"):
        if (value := getattr(start, name)) is not None:
            raise UserError(f"--{name} {value}: is for weights (--pretrained). Two encoders have their own.")
    assert start.image_encoder is not None and start.text_encoder is not None
    image, text = load_image_encoder(start.image_encoder), load_text_encoder(start.text_encoder)
    context = text.context if start.context_length is None else start.context_length
    if text.context is not None and context is not None and context > text.context:
        raise UserError(f"--context_length {context}: the text encoder takes {text.context} tokens at most.")
    return CustomCLIPWrapper(
        image,
        text,
        avg_word_embs=bool(start.avg_word_embs),
        project=True,
        tokenizer=_tokenizer(start.text_encoder, context),
        **how,
    )


def _tokenizer(source: str, context: int | None) -> Any:
    """The tokenizer that belongs to a text encoder."""
    prefix, _, name = source.partition(":")
    assert context is not None  # every source knows it
    try:
        return Tokenizer(context) if prefix == OWN else load_tokenizer(name, context)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _require_same(start: StartOptions, resumed: Resumption) -> StartOptions:
    """Refuse another start than the run had; what the options leave open of it is its own."""
    arguments = resumed.state.get("hyper_parameters", {})
    known = {name: _named(arguments[name]) for name in ENCODERS if arguments.get(name) is not None}
    asked = dataclasses.asdict(start)
    require_same_start(resumed, asked, known)
    return start if start.pretrained is not None else _with_encoders(start, known)


def _named(kept: Any) -> Any:
    """An encoder as the command line names it."""
    return f"{kept['source']}:{kept['name']}" if isinstance(kept, Mapping) else kept
