"""Train a CLIP, from scratch or from weights.

What a training verb begins with: weights of any source, or none; and what a run that goes on began with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from train_clip.checkpoints.found import Found, find_weights
from train_clip.checkpoints.sources import openai_name
from train_clip.commands.options import (
    AugmentationOptions,
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RunOptions,
    TrainerOptions,
    resolve_optimizer,
)
from train_clip.commands.run import Job, begin, no_advice, train_job
from train_clip.commands.run_folder import Resumption
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.files import write_text
from train_clip.models.config import ModelConfig, read_config
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.data_module import TextImageDataModule

OPENAI = "openai"
DEFAULT_MODEL = "ViT-B/32"


def pretrained_weights(model: ModelOptions) -> Found | None:
    """The weights that the options name; None where they name none.

    Raises:
        UserError: as ``find_weights``.
    """
    if model.pretrained is None:
        return None
    if model.pretrained != OPENAI:
        return find_weights(model.pretrained, model.choices)
    name = model.model_name or DEFAULT_MODEL
    if openai_name(name) is None:
        raise UserError(f"--pretrained {OPENAI} --model_name {name}: OpenAI has published no such model.")
    return find_weights(name, dataclasses.replace(model.choices, model_name=None))


def require_same_start(resumed: Resumption, asked: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Refuse another start than the run had: its state holds the model, and what is asked for would go unheard.

    Args:
        resumed: what the run goes on from.
        asked: options of what it starts from, by their names; None for one that was left out.
        known: those that the checkpoint itself tells of, for one that lies in no run; of others nothing may be asked.

    Raises:
        UserError: the run's own ``config.yaml``, or else the checkpoint, has another value.
    """
    config = None if resumed.run is None else resumed.run / "config.yaml"
    in_run = config is not None and config.is_file()
    kept = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config and in_run else known or {}
    for name, value in asked.items():
        was = kept.get(name)
        if value == was or (value is None and not in_run) or (name == "pretrained" and _same_weights(value, was)):
            continue
        raise UserError(
            f"{resumed.checkpoint}: the run began {_with(name, was)}, and is to go on {_with(name, value)}. Leave the "
            "option out, or begin a new run."
        )


def _same_weights(asked: str | None, was: str | None) -> bool:
    """Whether both name one file, or OpenAI's weights, which a run keeps by their model's name."""
    if asked is None or was is None:
        return False
    return Path(asked).resolve() == Path(was).resolve() or (asked == OPENAI and openai_name(was) is not None)


def _with(name: str, value: Any) -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"without --{name}" if value is None else f"with --{name} {shown}"


RECIPES = {"small": 300_000, "medium": 5_000_000}  # pairs that a recipe is for at most (docs/recipes.md)


def train(  # noqa: PLR0913, each is a group of options
    model: ModelOptions,
    data: DataOptions,
    augmentation: AugmentationOptions,
    optimizer: OptimizerOptions,
    objective: ObjectiveOptions,
    run: RunOptions,
    trainer: TrainerOptions,
) -> Path:
    """Train a CLIP on a folder of images and captions, from scratch or from weights.

    Args:
        model: the model.
        data: the data.
        augmentation: of its images.
        optimizer: which, and its numbers; the preset's where None.
        objective: what is minimised.
        run: length, seed and folder of the run.
        trainer: arguments of Lightning's Trainer.

    Returns:
        The run's folder.
    """
    resumed = begin(run)
    if resumed is not None:
        # The model itself is held against the run's by its sizes.
        require_same_start(resumed, {"pretrained": model.pretrained, "activation": model.activation})
    weights = pretrained_weights(model) if resumed is None else None
    config = choose_config(model) if weights is None else _require_clip(weights)
    numbers = dataclasses.asdict(optimizer) | dataclasses.asdict(objective) | dataclasses.asdict(augmentation)
    numbers |= {"optimizer": optimizer.optimizer or "adamw"}
    module = CLIPWrapper(config.name, config, seed=run.seed, ema=run.ema, **run.step, **numbers)
    if weights is not None:
        module.begin_with(weights.read(), weights.source)
    pairs = TextImageDataModule(
        image_size=config.image.size, context_length=config.text.context, seed=run.seed, **dataclasses.asdict(data)
    )

    def options(folder: Path) -> tuple[object, ...]:
        """What the run's ``config.yaml`` keeps."""
        kept = model if weights is None else dataclasses.replace(model, pretrained=weights.source)
        resolved = resolve_optimizer(optimizer, module.hparams)
        return _keep_model(kept, config, folder), data, augmentation, resolved, objective

    advice = recipe_for if optimizer.optimizer is None and weights is None else no_advice
    job = Job("train", module, pairs, config.optimizer.epochs, options, advice=advice)
    return train_job(job, run, trainer, resumed)


def recipe_for(num_pairs: int) -> str | None:
    """What there is to say of so few pairs, from scratch and by no chosen optimizer: which recipe is made for them.

    Args:
        num_pairs: to train on.
    """
    recipe = next((name for name, most in RECIPES.items() if num_pairs <= most), None)
    return recipe and (
        f"{num_pairs:,} pairs: the defaults are the paper's, made for 400 million. `--config {recipe}` learns more "
        "from as few (docs/recipes.md); `--optimizer adamw` keeps to the defaults without this line."
    )


def choose_config(model: ModelOptions) -> ModelConfig:
    """The model that the options name.

    Raises:
        UserError: there is none, it cannot be built, or CLIP's tokens are more than it has.
    """
    if model.activation is not None and model.pretrained is None:
        raise UserError(
            f"--activation {model.activation}: is for weights (--pretrained) that do not say theirs. Write a model of "
            "your own into a YAML file: `train-clip models --show ViT-B/32` prints one to start from."
        )
    config = _require_vocabulary(read_config(model.model_name or DEFAULT_MODEL))
    if model.image_size is not None:
        config = config.with_image_size(model.image_size)
    return config if model.context_length is None else config.with_context(model.context_length)


def _require_clip(weights: Found) -> ModelConfig:
    clip = weights.require_clip(", which `train-clip finetune --pretrained` trains on.")
    return _require_vocabulary(clip.config)


def _require_vocabulary(config: ModelConfig) -> ModelConfig:
    if config.text.vocab < Tokenizer.vocab_size:
        raise UserError(
            f"{config.name}: a vocabulary of {config.text.vocab:,}; CLIP's tokenizer has {Tokenizer.vocab_size:,} "
            "tokens. Set text.vocab to that."
        )
    return config


def _keep_model(model: ModelOptions, config: ModelConfig, folder: Path) -> ModelOptions:
    """Write a model that is no preset into the run, so that the run can be repeated when its file has changed."""
    if model.pretrained is None and not (model.model_name or "").endswith((".yaml", ".yml")):
        return dataclasses.replace(model, model_name=model.model_name or DEFAULT_MODEL)
    kept = folder / "model.yaml"
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        write_text(kept, yaml.safe_dump(config.to_dict(), sort_keys=False))
    return dataclasses.replace(model, model_name=str(kept))
