"""The module that trains a dual encoder of transformers on pairs."""

from collections.abc import Mapping
from typing import Any, Unpack

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from train_clip.adapters.model import AdaptedModel
from train_clip.adapters.tokenizer import FamilyTokenizer, tokenizer_for
from train_clip.encoders.custom import freeze_unreached
from train_clip.keywords import TrainingKeywords
from train_clip.models.config import OptimizerConfig
from train_clip.options import StepOptions, TowerOptions, TrainingOptions
from train_clip.training.module import ContrastiveModule

# Rate, warm-up and epochs of github.com/mlfoundations/wise-ft (README); the rest is PyTorch's, without decay.
FINETUNING = OptimizerConfig(lr=3e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=500, epochs=10)


class AdapterWrapper(ContrastiveModule):
    """A dual encoder of transformers that trains with any ``Trainer``, and embeds images and captions afterwards.

    ``AdapterWrapper.load_from_checkpoint(path)`` needs no further arguments.

    Args:
        adapter: which model it is, as ``train_clip.checkpoints.found.find_weights(source).arguments`` tells.
        tokenizer: likewise.
        options: of ``train_clip.options.TrainingOptions``; the model's own loss by default.
    """

    model: AdaptedModel
    names_of_model = ("adapter", "tokenizer")
    free_to_change = (*ContrastiveModule.free_to_change, "tokenizer")

    def __init__(
        self,
        adapter: Mapping[str, Any],
        tokenizer: str | Mapping[str, Any],
        minibatch_size: int = StepOptions.minibatch_size,
        learning_rate: float | None = None,
        kl_coeff: float = TowerOptions.kl_coeff,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        model = AdaptedModel(adapter)
        own = {"minibatch_size": minibatch_size, "learning_rate": learning_rate, "kl_coeff": kl_coeff}
        given = TrainingOptions.of({**options, **own}, loss=adapter.get("loss", model.family.loss))
        if given.objective.loss == "sigmoid":
            model.add_bias()
        of_model = tokenizer_for(model, tokenizer)
        if frozen := freeze_unreached(model, of_model(["a caption", "another one"])):
            rank_zero_info(f"{len(frozen)} tensors do not affect the loss and are not trained: {', '.join(frozen)}.")
        super().__init__(model, FINETUNING, given)
        self.tokenizer = of_model
        # A checkpoint's own loss is the next run's too.
        told = {**adapter, "loss": self.options.objective.loss}
        self.save_hyperparameters({"adapter": told} | self.options.flat())

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Not among the hparams: a vocabulary is nothing for the loggers that show them.
        assert isinstance(self.tokenizer, FamilyTokenizer)
        checkpoint["hyper_parameters"] = checkpoint["hyper_parameters"] | {"tokenizer": self.tokenizer.describe()}
