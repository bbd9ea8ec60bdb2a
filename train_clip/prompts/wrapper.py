"""Visual prompts beside a frozen CLIP, and the module that trains them (VPT, arXiv 2203.12119).

Its checkpoints hold what is trained; the backbone stays in its own file, which they name by place and by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from train_clip.checkpoints.found import Found, FoundCLIP, digest_of, fill, find_model, find_weights
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import OptimizerConfig, config_from_dict
from train_clip.prompts.config import PromptConfig
from train_clip.prompts.model import add_prompts
from train_clip.training.bridge import training_options
from train_clip.training.module import ContrastiveModule
from train_clip.training.tuning import make_tuning, take_economy

EPOCHS = 100  # VPT, appendix A, table 6
NO_LIMIT = 2**31  # steps: the warm-up is a tenth of any run, as 10 epochs of 100 are there


class PromptCLIPWrapper(ContrastiveModule):
    """Visual prompts that train under any ``Trainer``, in the image tower of a CLIP that stays as it is.

    ``PromptCLIPWrapper.load_from_checkpoint(path)`` looks for the backbone where it was;
    ``load_from_checkpoint(path, backbone=…)`` elsewhere.

    Args:
        backbone: whatever ``train_clip.load`` takes, and holds a CLIP with a vision transformer; or what
            ``find_weights`` gave.
        prompts: how many, and where; or its fields as plain data.
        minibatch_size: pairs encoded at a time on one process; 0 for all at once. The gradient is the same.
        learning_rate: at the peak.
        weight_decay: of the prompts.
        warmup_steps: optimizer steps until the peak; None for a tenth of the run.
        seed: decides the random state of each step. Prompts are drawn from PyTorch's global generator.
        digest: of the backbone, as a checkpoint has it.
        config: of the backbone, likewise.
        tuning: how it is trained, see ``Tuning``, SGD where it does not say, without distillation; and how a step is
            computed, see ``Economy``.

    Raises:
        UserError: the backbone cannot be loaded, is another than the checkpoint's, or has no tokens.
    """

    model: CLIP
    names_of_model: ClassVar[tuple[str, ...]] = ("backbone", "prompts", "digest", "config")
    free_to_change: ClassVar[tuple[str, ...]] = ("minibatch_size", "backbone")

    def __init__(  # noqa: PLR0913, as the other wrappers
        self,
        backbone: str | Path | Found,
        prompts: PromptConfig | Mapping[str, Any],
        minibatch_size: int = 0,
        learning_rate: float = 0.1,
        weight_decay: float = 0.0,
        warmup_steps: int | None = None,
        seed: int = 0,
        digest: str | None = None,
        config: Mapping[str, Any] | None = None,
        **tuning: Any,
    ) -> None:
        economy = take_economy(tuning, minibatch_size)
        choices = make_tuning(tuning, optimizer="sgd", lock_text=True)
        if choices.distillation != "none":
            raise UserError(f"distillation is {choices.distillation!r}; prompts are tuned without a teacher.")
        if choices.has_half_weights:
            raise UserError(f"half_weights is {choices.half_weights!r}; the backbone of prompts stays as it is.")
        for name, usual in (("mask_ratio", 0), ("stochastic_depth", 0), ("layer_decay", 1)):
            if (value := getattr(choices, name)) != usual:
                raise UserError(f"{name} is {value}; the backbone of prompts stays and runs as it is. Leave it out.")
        if not isinstance(prompts, PromptConfig):
            prompts = PromptConfig(**(dict(prompts) | {"layers": tuple(prompts["layers"])}))
        if not isinstance(backbone, Found):
            backbone = (
                find_weights(backbone)
                if config is None
                else find_model(backbone, config_from_dict(dict(config), str(backbone)))
            )
        backbone = backbone.require_clip()
        model, found = _model_of(backbone, digest)
        if choices.loss == "sigmoid" and model.logit_bias is None:
            raise UserError(
                f"loss is 'sigmoid', and {backbone.source} has no logit_bias, being trained with the softmax loss. A "
                "backbone stays as it is: leave the loss out."
            )
        add_prompts(model, prompts)
        optimizer = OptimizerConfig(learning_rate, (0.9, 0.999), 1e-8, weight_decay, NO_LIMIT, EPOCHS)
        super().__init__(model, optimizer, training_options(choices, economy, warmup_steps, seed))
        self.tokenizer = Tokenizer(model.config.text.context)
        self.save_hyperparameters(
            {
                "backbone": _place(backbone.source),
                "prompts": dataclasses.asdict(prompts) | {"layers": list(prompts.layers)},
                "minibatch_size": minibatch_size,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "seed": seed,
                "digest": found,
                "config": model.config.to_dict(),
            }
            | dataclasses.asdict(choices)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone, and its mean."""
        super().on_save_checkpoint(checkpoint)
        kept = self._kept()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the backbone, which this module has from its own file, so that loading stays strict."""
        super().on_load_checkpoint(checkpoint)
        kept = self._kept()
        frozen = {name: value for name, value in self.state_dict().items() if name not in kept}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def _kept(self) -> set[str]:
        """What is trained, and the running mean of it."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | {f"ema.{name}" for name in trained} | {"ema._extra_state"}


def _model_of(weights: FoundCLIP, digest: str | None) -> tuple[CLIP, str]:
    """The backbone that prompts are put beside, and what it is by its content.

    Raises:
        UserError: it is another than the digest says.
    """
    tensors = weights.read_as_kept()
    found = digest_of(tensors)
    if digest not in (None, found):
        raise UserError(
            f"{weights.source}: another backbone than the prompts were trained beside: SHA-256 of its weights {found}, "
            f"expected {digest}. Give that one: backbone=…"
        )
    model = CLIP(weights.config)
    fill(model, weights.resized(tensors), weights.source)
    return model, found


def _place(source: str) -> str:
    """Where a backbone lies, whatever folder a later command is run in."""
    return str(Path(source).resolve()) if Path(source).exists() else source
