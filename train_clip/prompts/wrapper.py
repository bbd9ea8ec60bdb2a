"""Visual prompts for a frozen CLIP, and the module that trains them (VPT, arXiv 2203.12119).

Its checkpoints hold what is trained; the backbone stays in its own file, which they name by place and by content.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from typing_extensions import override

from train_clip.checkpoints import found
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.keywords import TrainingKeywords
from train_clip.models.clip import CLIP
from train_clip.models.config import OptimizerConfig, config_from_dict
from train_clip.options import StepOptions, TowerOptions, TrainingOptions
from train_clip.prompts.file import PromptConfig, read_backbone, telling_of_backbone
from train_clip.prompts.model import add_prompts
from train_clip.training.module import ContrastiveModule

# VPT, appendix A, table 6: the warm-up is a tenth of any run, as 10 epochs of 100 are there. Betas and eps: PyTorch's.
VPT = OptimizerConfig(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=2**31, epochs=100)


class BesideBackbone(ContrastiveModule):
    """Trains a few parameters beside a frozen model, which stays in its own file: checkpoints hold what is trained."""

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        kept = self._kept()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        # The backbone, which this module has from its own file, so that loading stays strict.
        kept = self._kept()
        frozen = {name: value for name, value in self.state_dict().items() if name not in kept}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def _kept(self) -> set[str]:
        """What is trained, and the EMA of it."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | {f"ema.{name}" for name in trained} | {"ema._extra_state"}

    @staticmethod
    def place_of(source: str) -> str:
        """Where a backbone lies, whatever folder a later command is run in."""
        return str(Path(source).resolve()) if Path(source).exists() else source


class PromptCLIPWrapper(BesideBackbone):
    """Visual prompts that train with any ``Trainer``, in the image tower of a frozen CLIP.

    ``PromptCLIPWrapper.load_from_checkpoint(path)`` looks for the backbone where it was;
    ``load_from_checkpoint(path, backbone=…)`` elsewhere.

    Args:
        backbone: whatever ``train_clip.load`` takes, and holds a CLIP with a vision transformer; or what
            ``find_weights`` gave.
        prompts: their number and blocks; or these fields as plain data.
        digest: of the backbone, as a checkpoint has it.
        config: of the backbone, likewise.
        options: of ``train_clip.options.TrainingOptions``; SGD by default.
    """

    model: CLIP
    names_of_model = ("backbone", "prompts", "digest", "config")
    free_to_change = (*ContrastiveModule.free_to_change, "backbone")

    def __init__(  # noqa: PLR0913, by name
        self,
        backbone: str | Path | found.Found,
        prompts: PromptConfig | Mapping[str, Any],
        minibatch_size: int = StepOptions.minibatch_size,
        learning_rate: float = VPT.lr,
        *,
        digest: str | None = None,
        config: Mapping[str, Any] | None = None,
        kl_coeff: float = TowerOptions.kl_coeff,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        own = {"minibatch_size": minibatch_size, "learning_rate": learning_rate, "kl_coeff": kl_coeff}
        given = TrainingOptions.of({**options, **own}, optimizer="sgd", lock_text=True, distillation="none")
        off = {"distillation": "none", "half_weights": "none", "mask_ratio": 0, "stochastic_depth": 0, "layer_decay": 1}
        for name, value in given.flat().items():
            if value != off.get(name, value):
                raise UserError(f"{name} is {value}; the backbone of prompts is frozen and not changed. Leave it out.")
        if not isinstance(prompts, PromptConfig):
            prompts = PromptConfig(**prompts)
        if not isinstance(backbone, found.Found):
            with telling_of_backbone("visual prompts"):
                if config is None:
                    backbone = found.find_weights(backbone)
                else:
                    backbone = found.find_model(backbone, config_from_dict(config, str(backbone)))
        backbone = backbone.require_clip()
        source = backbone.source
        tensors, digest = read_backbone(backbone, digest)
        model = CLIP(backbone.config)
        found.fill(model, tensors, source)
        if given.objective.loss == "sigmoid" and model.logit_bias is None:
            raise UserError(
                f"loss is 'sigmoid', and {source} has no logit_bias: it was trained with the softmax loss. A backbone "
                "is not changed: leave out the loss."
            )
        add_prompts(model, prompts)
        super().__init__(model, VPT, given)
        self.tokenizer = Tokenizer(model.config.text.context)
        self.save_hyperparameters(
            {
                "backbone": self.place_of(source),
                "prompts": dataclasses.asdict(prompts) | {"layers": list(prompts.layers)},
                "digest": digest,
                "config": model.config.to_dict(),
            }
            | self.options.flat()
        )
