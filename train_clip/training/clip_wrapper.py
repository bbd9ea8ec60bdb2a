"""CLIP from scratch: a preset or a configuration, and the module that trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from train_clip.data.tokenizer import Tokenizer
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, config_from_dict, read_config
from train_clip.training.bridge import training_options
from train_clip.training.module import ContrastiveModule
from train_clip.training.tuning import make_tuning, take_economy


class CLIPWrapper(ContrastiveModule):
    """A CLIP that trains under any ``Trainer``, and embeds images and captions afterwards.

    ``CLIPWrapper.load_from_checkpoint(path)`` needs no further arguments.

    Args:
        model_name: a preset (``train-clip models`` lists them) or a path to a YAML file. Only a name where ``config``
            is given.
        config: the model itself, as a ``ModelConfig``, as a dict in a preset's form, or in the flat form of
            train-CLIP's configuration files.
        minibatch_size: pairs encoded at a time on one process; 0 for all at once. The gradient is the same.
        learning_rate: at the peak; like the next three, the preset's where None.
        weight_decay: on matrices and convolutions.
        betas: AdamW's.
        eps: AdamW's.
        warmup_steps: optimizer steps until the peak; None for the preset's (2,000), or a tenth of
            a run that is short.
        seed: decides the random state of each step. Weights are drawn from PyTorch's global generator.
        tuning: what is trained and towards what, see ``Tuning``; and how a step is computed, see
            ``Economy``.

    Raises:
        UserError: an unknown preset, or a configuration that does not fit together.
    """

    names_of_model: ClassVar[tuple[str, ...]] = ("model_name", "config")
    free_to_change: ClassVar[tuple[str, ...]] = ("minibatch_size", "model_name")

    def __init__(  # noqa: PLR0913, people know these arguments
        self,
        model_name: str = "ViT-B/32",
        config: ModelConfig | dict[str, Any] | None = None,
        minibatch_size: int = 0,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        betas: Sequence[float] | None = None,
        eps: float | None = None,
        warmup_steps: int | None = None,
        seed: int = 0,
        **tuning: Any,
    ) -> None:
        if config is None:
            config = read_config(model_name)
        elif isinstance(config, dict):
            config = config_from_dict({"name": model_name} | config, model_name)
        given = {
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "betas": None if betas is None else tuple(betas),
            "eps": eps,
        }
        told = {name: value for name, value in given.items() if value is not None}
        optimizer = dataclasses.replace(config.optimizer, **told)  # type: ignore[arg-type]
        economy = take_economy(tuning, minibatch_size)
        choices = make_tuning(tuning)
        config = dataclasses.replace(config, logit_bias=choices.loss == "sigmoid")
        super().__init__(CLIP(config), optimizer, training_options(choices, economy, warmup_steps, seed))
        self.tokenizer = Tokenizer(config.text.context)
        # Plain values only: anything else makes the file unloadable without running code.
        self.save_hyperparameters(
            {
                "model_name": config.name,
                "config": config.to_dict(),
                "minibatch_size": minibatch_size,
                "learning_rate": optimizer.lr,
                "weight_decay": optimizer.weight_decay,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "warmup_steps": warmup_steps,
                "seed": seed,
            }
            | dataclasses.asdict(choices)
        )
