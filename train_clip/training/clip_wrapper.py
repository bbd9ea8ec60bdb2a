"""CLIP from scratch: a preset or a configuration, and the module that trains it."""

import dataclasses
from typing import Any, Unpack

from train_clip.data.tokenizer import Tokenizer
from train_clip.keywords import TrainingKeywords
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, config_from_dict, read_config
from train_clip.options import StepOptions, TowerOptions, TrainingOptions
from train_clip.training.module import ContrastiveModule


class CLIPWrapper(ContrastiveModule):
    """A CLIP that trains with any ``Trainer``, and embeds images and captions afterwards.

    ``CLIPWrapper.load_from_checkpoint(path)`` needs no further arguments. Weights are drawn from PyTorch's global
    generator.

    Args:
        model_name: a preset (``train-clip models`` lists them) or a path to a YAML file. Only a name where ``config``
            is given.
        config: the model itself, as a ``ModelConfig``, as a dict in a preset's form, or in the flat form of
            train-CLIP's configuration files.
        options: of ``train_clip.options.TrainingOptions``, as ``minibatch_size``.
    """

    names_of_model = ("model_name", "config")
    free_to_change = (*ContrastiveModule.free_to_change, "model_name")

    def __init__(
        self,
        model_name: str = "ViT-B/32",
        config: ModelConfig | dict[str, Any] | None = None,
        minibatch_size: int = StepOptions.minibatch_size,
        *,
        learning_rate: float | None = None,
        kl_coeff: float = TowerOptions.kl_coeff,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        if config is None:
            config = read_config(model_name)
        elif isinstance(config, dict):
            config = config_from_dict({"name": model_name} | config, model_name)
        own = {"minibatch_size": minibatch_size, "learning_rate": learning_rate, "kl_coeff": kl_coeff}
        given = TrainingOptions.of({**options, **own})
        config = dataclasses.replace(config, logit_bias=given.objective.loss == "sigmoid")
        super().__init__(CLIP(config), config.optimizer, given)
        self.tokenizer = Tokenizer(config.text.context)
        # Plain values only: anything else makes the file unloadable without running code.
        self.save_hyperparameters({"model_name": config.name, "config": config.to_dict()} | self.options.flat())
