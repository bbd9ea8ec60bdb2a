"""The module that trains LoRA beside a frozen, pretrained model of any kind.

Its checkpoints hold what is trained; the backbone stays in its own file, which they name by place and by content.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, Unpack

from typing_extensions import override

from train_clip.checkpoints import found
from train_clip.errors import UserError
from train_clip.keywords import TrainingKeywords
from train_clip.lora.layers import add_lora
from train_clip.models.blocks import training_norms
from train_clip.models.config import OptimizerConfig
from train_clip.options import LoRAOptions, StepOptions, TowerOptions, TrainingOptions, WeightOptions
from train_clip.prompts.file import require_digest, telling_of_backbone
from train_clip.prompts.wrapper import BesideBackbone

# LoRA wants about ten times the learning rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret",
# thinkingmachines.ai/blog/lora), here that of github.com/mlfoundations/wise-ft; the rest is as there.
LORA = OptimizerConfig(lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=500, epochs=10)
# What changes or copies the weights that are frozen here.
OFF = {"distillation": "none", "half_weights": "none"}


class LoRAWrapper(BesideBackbone):
    """LoRA that trains with any ``Trainer``, beside the frozen layers of a CLIP, or of another dual encoder.

    ``LoRAWrapper.load_from_checkpoint(path)`` looks for the backbone where it was;
    ``load_from_checkpoint(path, backbone=…)`` elsewhere. ``train_clip.load(path)`` gives the model, LoRA merged.

    Args:
        backbone: whatever ``train_clip.load`` takes; or what ``find_weights`` gave.
        lora: of ``train_clip.options.LoRAOptions``; or its fields as plain data.
        digest: of the backbone, as a checkpoint has it.
        choices: what was chosen for it (``train_clip.options.WeightOptions``), likewise.
        options: of ``train_clip.options.TrainingOptions``.
    """

    names_of_model = ("backbone", "lora", "digest", "choices")
    free_to_change = (*BesideBackbone.free_to_change, "backbone")

    def __init__(  # noqa: PLR0913, by name
        self,
        backbone: str | Path | found.Found,
        lora: LoRAOptions | Mapping[str, Any],
        minibatch_size: int = StepOptions.minibatch_size,
        learning_rate: float | None = None,
        *,
        digest: str | None = None,
        choices: Mapping[str, Any] | None = None,
        kl_coeff: float = TowerOptions.kl_coeff,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        asked = lora if isinstance(lora, LoRAOptions) else LoRAOptions(**lora)
        settled = WeightOptions(**choices or {})
        with telling_of_backbone("LoRA"):
            weights = backbone if isinstance(backbone, found.Found) else found.find_weights(backbone, settled)
        kept = weights.read_as_kept()
        digest, (model, tokenizer) = require_digest(kept, digest, weights.source), weights.empty()
        found.fill(model, weights.resized(kept), weights.source)
        own = {"minibatch_size": minibatch_size, "learning_rate": learning_rate, "kl_coeff": kl_coeff}
        of_model = "softmax" if model.logit_bias is None else "sigmoid"
        given = TrainingOptions.of({**options, **own}, loss=of_model, optimizer="adamw", distillation="none")
        # A tower without LoRA is not trained: no graph of it, and captions that no step changes are embedded once.
        locked = {f"lock_{tower}": asked.lora_towers not in ("both", tower) for tower in ("image", "text")}
        for name, value in given.flat().items():
            if value and value != (OFF | locked).get(name, value):
                raise UserError(f"{name} is {value!r}, which does not go with this LoRA. Leave it out.")
        if "sigmoid" in (given.objective.loss, of_model) and given.objective.loss != of_model:
            raise UserError(
                f"loss is {given.objective.loss!r}, and {weights.source} was trained with the {of_model} loss, whose "
                "temperature it has. Leave out the loss, or train all weights."
            )
        add_lora(model, asked)
        super().__init__(model, LORA, TrainingOptions.of(given.flat() | locked))
        self.tokenizer = tokenizer
        about = {"lora": asdict(asked), "digest": digest, "choices": asdict(settled)}
        self.save_hyperparameters({"backbone": self.place_of(weights.source)} | about | self.options.flat())
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> Self:
        # Statistics of BatchNorms are the backbone's, frozen as its weights are: no checkpoint has them.
        super().train(mode)
        for norm in training_norms(self.model):
            norm.eval()
        return self
