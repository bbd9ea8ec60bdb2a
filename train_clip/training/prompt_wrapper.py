"""Visual prompts beside a frozen CLIP, and the module that trains them (VPT, arXiv 2203.12119).

Its checkpoints hold what is trained; the backbone stays in its own file, which they name by place and by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from train_clip.checkpoints.digest import digest_of
from train_clip.checkpoints.found import Choices
from train_clip.checkpoints.weights import Weights, fill, find_weights
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import OptimizerConfig
from train_clip.models.prompt_config import PromptConfig
from train_clip.models.prompts import add_prompts
from train_clip.training.module import ContrastiveModule
from train_clip.training.tuning import make_tuning

EPOCHS = 100  # VPT, appendix A, table 6
NO_LIMIT = 2**31  # steps: the warm-up is a tenth of any run, as 10 epochs of 100 are there


class PromptCLIPWrapper(ContrastiveModule):
    """Visual prompts that train under any ``Trainer``, in the image tower of a CLIP that stays as it is.

    ``PromptCLIPWrapper.load_from_checkpoint(path)`` looks for the backbone where it was;
    ``load_from_checkpoint(path, backbone=…)`` elsewhere.

    Args:
        backbone: whatever ``train_clip.load`` takes, and holds a CLIP with a vision transformer.
        prompts: how many, and where; or its fields as plain data.
        minibatch_size: pairs encoded at a time on one process; 0 for all at once. The gradient is the same.
        learning_rate: at the peak.
        weight_decay: of the prompts.
        warmup_steps: optimizer steps until the peak; None for a tenth of the run.
        seed: decides the random state of each step. Prompts are drawn from PyTorch's global generator.
        digest: of the backbone, as a checkpoint has it.
        backbone_choices: what the backbone's file leaves open, see ``Choices``.
        tuning: what is trained and towards what, see ``Tuning``; SGD where it does not say.

    Raises:
        UserError: the backbone cannot be loaded, is another than the digest's, or has no tokens.
    """

    model: CLIP
    names_of_model: ClassVar[tuple[str, ...]] = ("backbone", "prompts", "digest", "backbone_choices")
    free_to_change: ClassVar[tuple[str, ...]] = ("minibatch_size", "backbone")

    def __init__(  # noqa: PLR0913, as the other wrappers
        self,
        backbone: str | Path,
        prompts: PromptConfig | Mapping[str, Any],
        minibatch_size: int = 0,
        learning_rate: float = 0.1,
        weight_decay: float = 0.0,
        warmup_steps: int | None = None,
        seed: int = 0,
        digest: str | None = None,
        backbone_choices: Mapping[str, Any] | None = None,
        **tuning: Any,
    ) -> None:
        open_choices = dict(backbone_choices or {})
        if not isinstance(prompts, PromptConfig):
            prompts = PromptConfig(**(dict(prompts) | {"layers": tuple(prompts["layers"])}))
        model, found = _backbone(find_weights(backbone, Choices(**open_choices)), digest)
        add_prompts(model, prompts)
        choices = make_tuning(tuning, optimizer="sgd", lock_text=True)
        optimizer = OptimizerConfig(learning_rate, (0.9, 0.999), 1e-8, weight_decay, NO_LIMIT, EPOCHS)
        super().__init__(model, optimizer, choices, warmup_steps, minibatch_size, seed)
        self.tokenizer = Tokenizer(model.config.text.context)
        self.save_hyperparameters(
            {
                "backbone": str(backbone),
                "prompts": dataclasses.asdict(prompts) | {"layers": list(prompts.layers)},
                "minibatch_size": minibatch_size,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "seed": seed,
                "digest": found,
                "backbone_choices": open_choices,
            }
            | dataclasses.asdict(choices)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone."""
        super().on_save_checkpoint(checkpoint)
        trained = self._trained()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the backbone, which this module has from its own file, so that loading stays strict."""
        super().on_load_checkpoint(checkpoint)
        trained = self._trained()
        frozen = {name: value for name, value in self.state_dict().items() if name not in trained}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def _backbone(weights: Weights, digest: str | None) -> tuple[CLIP, str]:
    """The backbone that prompts are put beside, and what it is by its content.

    Raises:
        UserError: it is no CLIP, has prompts already, or is another than the digest says.
    """
    if weights.config is None or weights.found.prompts is not None:
        raise UserError(f"{weights.source}: {weights.found.format}; expected a CLIP without prompts.")
    tensors = weights.read()
    found = digest_of(tensors)
    if digest not in (None, found):
        raise UserError(
            f"{weights.source}: another backbone than the prompts were trained beside: SHA-256 of its weights {found}, "
            f"expected {digest}. Give that one: backbone=…"
        )
    model = CLIP(weights.config)
    fill(model, tensors, weights.source)
    return model, found
