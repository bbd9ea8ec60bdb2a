"""Train a CLIP, from scratch or from weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_only

from train_clip.checkpoints.weights import Weights, require_no_prompts
from train_clip.commands.beginning import DEFAULT_MODEL, pretrained_weights, require_same_start
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
from train_clip.commands.training_run import Job, begin, no_advice, train_job
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.files import write_text
from train_clip.models.config import ModelConfig, read_config
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.data_module import TextImageDataModule

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


def _require_clip(weights: Weights) -> ModelConfig:
    require_no_prompts(weights.found, weights.source)
    if weights.config is None:
        raise UserError(
            f"--pretrained {weights.source}: two encoders, which `train-clip finetune --pretrained` trains on."
        )
    return _require_vocabulary(weights.config)


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
