"""Fine-tune: two pretrained encoders, or a trained CLIP."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_clip.commands.run import Job, begin, data_for, remake, train_job
from train_clip.commands.train import MODULES, kind_of, pretrained_weights
from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders import sources, tokenizer
from train_clip.encoders.wrapper import OTTER, CustomCLIPWrapper
from train_clip.errors import UsageError, UserError
from train_clip.options import DataOptions, ModelOptions, RunOptions, TrainerOptions, TrainingOptions, flat, option
from train_clip.training.clip_wrapper import CLIPWrapper

# What differs for a trained CLIP: rate and epochs are those of github.com/mlfoundations/wise-ft (README), for ViT-B/32
# and batches of 512; the rest is that of training it from scratch.
OF_CLIP = {"optimizer": "adamw", "distillation": "none", "learning_rate": 3e-5, "weight_decay": 0.0}
# SGD's rate is far too high for the others (the rate of benchmarks/distillation.py in docs/finetuning.md).
OF_OPTIMIZER = {"adamw": {"learning_rate": 3e-4}, "muon": {"learning_rate": 3e-4}}
# What two encoders are joined of where nothing else is asked for.
ENCODERS: dict[str, Any] = {
    "image_encoder": "hf:microsoft/resnet-50",
    "text_encoder": "hf:johngiorgi/declutr-sci-base",
    "avg_word_embs": True,
}


@dataclasses.dataclass(frozen=True)
class StartOptions(ModelOptions):
    """What to start from."""

    image_encoder: str | None = option(
        None,
        "hf:NAME or hf:FOLDER, timm:NAME, torchvision:NAME, train-clip:CHECKPOINT; default: hf:microsoft/resnet-50",
    )
    text_encoder: str | None = option(
        None,
        "hf:NAME or hf:FOLDER, train-clip:CHECKPOINT; default: hf:johngiorgi/declutr-sci-base",
    )
    avg_word_embs: bool | None = option(
        None,
        "pool a caption by the mean over its tokens, not by the text encoder's own pooling; default: true",
    )


def finetune(
    start: StartOptions, data: DataOptions, training: TrainingOptions, run: RunOptions, trainer: TrainerOptions
) -> Path:
    """Fine-tune two pretrained encoders, self-distilled, or a trained CLIP on pairs of your own."""
    resumed = begin(run, training.step.seed)
    usual = OF_CLIP if start.pretrained is not None else OF_OPTIMIZER.get(training.optimizer.optimizer or "", {})
    how = usual | {name: value for name, value in training.flat().items() if value is not None}
    known = ENCODERS if resumed is None else _known(start, resumed)
    if start.pretrained is None:
        start = dataclasses.replace(start, **{name: known[name] for name in known if getattr(start, name) is None})
    module: Any
    if resumed is not None:
        module = remake(kind_of(resumed.arguments), resumed.arguments, str(resumed.checkpoint), **how)
    elif start.pretrained is None:
        module = _join(start, how)
    else:
        module, source = _train_on(start, how)
        start = dataclasses.replace(start, pretrained=source)
    options = flat(start, data) | training.flat()
    job = Job("finetune", module, data_for(module, data), options, OTTER.epochs)
    return train_job(job, run, trainer, resumed)


def _train_on(start: StartOptions, how: Mapping[str, Any]) -> tuple[Any, str]:
    """The whole model that the options name, and where it was found; an optimizer's state is left behind."""
    for name in ENCODERS:
        if getattr(start, name) is not None:
            raise UserError(
                f"--{name}: is for joining two encoders; --pretrained {start.pretrained} is a whole model with its "
                "own encoders. Leave out one of the two options."
            )
    weights = pretrained_weights(start)
    assert weights is not None
    module: Any
    if MODULES.keys() & weights.arguments.keys():
        module = remake(kind_of(weights.arguments), weights.arguments, weights.source, **how)
    else:
        config = weights.require_clip().config
        module = CLIPWrapper(config.name, config, **how)
    module.begin_with(weights.read(), weights.source)
    return module, weights.source


def _join(start: StartOptions, how: Mapping[str, Any]) -> CustomCLIPWrapper:
    """The two encoders, with the tokenizer of the text encoder and a projection where their widths differ."""
    for name in ("model_name", "activation", "image_size"):
        if (value := getattr(start, name)) is not None:
            raise UsageError(f"--{name} {value}: is only for weights (--pretrained). The two encoders define it.")
    assert start.image_encoder is not None and start.text_encoder is not None
    image, text = sources.load_image_encoder(start.image_encoder), sources.load_text_encoder(start.text_encoder)
    assert text.context is not None  # every source knows it
    context = start.context_length or text.context
    if context > text.context:
        raise UsageError(f"--context_length {context}: the text encoder takes {text.context} tokens at most.")
    prefix, _, name = start.text_encoder.partition(":")
    try:
        own = Tokenizer(context) if prefix == sources.OWN else tokenizer.load_tokenizer(name, context)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    average = bool(start.avg_word_embs)
    return CustomCLIPWrapper(image, text, avg_word_embs=average, project=True, tokenizer=own, **how)


def _known(start: StartOptions, resumed: Any) -> dict[str, Any]:
    """What the run began with, as the command line names it; another start is refused."""
    told = {name: kept for name in ENCODERS if (kept := resumed.arguments.get(name)) is not None}
    known = {name: sources.describe_encoder(kept) if isinstance(kept, Mapping) else kept for name, kept in told.items()}
    resumed.require_same_start(dataclasses.asdict(start), known)
    return known
