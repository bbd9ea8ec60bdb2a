"""Train a CLIP from scratch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_only

from train_clip.commands.options import (
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RunOptions,
    TrainerOptions,
)
from train_clip.commands.training_run import Job, begin, train_job
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.files import write_text
from train_clip.models.config import ModelConfig, read_config
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.data_module import TextImageDataModule


def train(
    model: ModelOptions,
    data: DataOptions,
    optimizer: OptimizerOptions,
    objective: ObjectiveOptions,
    run: RunOptions,
    trainer: TrainerOptions,
) -> Path:
    """Train a CLIP from scratch on a folder of images and captions.

    Args:
        model: the model.
        data: the data.
        optimizer: AdamW's numbers; the preset's where None.
        objective: what is minimised.
        run: length, seed and folder of the run.
        trainer: arguments of Lightning's Trainer.

    Returns:
        The run's folder.
    """
    resumed = begin(run)
    config = choose_config(model)
    numbers = dataclasses.asdict(optimizer) | dataclasses.asdict(objective)
    module = CLIPWrapper(config.name, config, model.minibatch_size, seed=run.seed, **numbers)
    pairs = TextImageDataModule(
        image_size=config.image.size, context_length=config.text.context, seed=run.seed, **dataclasses.asdict(data)
    )

    def options(folder: Path) -> tuple[object, ...]:
        """What the run's ``config.yaml`` keeps."""
        resolved = OptimizerOptions(
            **{field.name: module.hparams[field.name] for field in dataclasses.fields(optimizer)}
        )
        return _keep_model(model, config, folder), data, resolved, objective

    return train_job(Job("train", module, pairs, config.optimizer.epochs, options), run, trainer, resumed)


def choose_config(model: ModelOptions) -> ModelConfig:
    """The model that the options name.

    Raises:
        UserError: there is none, it cannot be built, or CLIP's tokens are more than it has.
    """
    config = read_config(model.model_name)
    if config.text.vocab < Tokenizer.vocab_size:
        raise UserError(
            f"{config.name}: a vocabulary of {config.text.vocab:,}; CLIP's tokenizer has {Tokenizer.vocab_size:,} "
            "tokens. Set text.vocab to that."
        )
    return config if model.image_size is None else config.with_image_size(model.image_size)


def _keep_model(model: ModelOptions, config: ModelConfig, folder: Path) -> ModelOptions:
    """Copy a model file of the user's own into the run, so that the run can be repeated when the file has changed."""
    if not model.model_name.endswith((".yaml", ".yml")):
        return model
    kept = folder / "model.yaml"
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        write_text(kept, yaml.safe_dump(config.to_dict(), sort_keys=False))
    return dataclasses.replace(model, model_name=str(kept))
