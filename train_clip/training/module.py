"""The one LightningModule: two encoders, the contrastive objective, and the step that every kind of training shares.

B  pairs on this process      W  processes      N  pairs of the global batch (W · B)      D  embedding width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.gather import gather_with_gradient, world
from train_clip.losses.contrastive import Pairs, accuracy, clip_loss
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, OptimizerConfig
from train_clip.training.chunks import encode_in_chunks
from train_clip.training.end_of_step import EndOfStep
from train_clip.training.optimizer import build_adamw, build_schedule, warmup_for
from train_clip.training.skips import SkipReport
from train_clip.training.trainer_state import gradient_scaler, resuming
from train_clip.training.validation import ValidationSplit
from train_clip.types import Batch

IMAGE_TOWER, TEXT_TOWER = 0, 1  # tell the towers' random states apart
LARGEST_NORMALISED = 5.0  # normalised pixels lie within ±2.7; twice that is no rounding


class ContrastiveModule(L.LightningModule):
    """Trains a CLIP on batches that start with images and texts.

    Works under any ``Trainer`` and with any loader. Images are uint8, or float that is already normalised; texts are
    token tensors (B, L), lists of strings, or a tokenizer's mapping with ``input_ids``.

    Args:
        model: both towers and the temperature.
        optimizer: AdamW's numbers.
        warmup_steps: optimizer steps until the peak; None for the optimizer's own, or a tenth of a run that is short.
        minibatch_size: pairs encoded at a time on one process; 0 for all at once. The gradient is the same.
        seed: with the count of batches it decides the random state of each step.
    """

    def __init__(
        self,
        model: CLIP,
        optimizer: OptimizerConfig,
        warmup_steps: int | None = None,
        minibatch_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = Tokenizer(model.config.text.context)
        self._end_of_step = EndOfStep()
        self._optimizer_config = optimizer
        self._warmup_steps = warmup_steps
        self._minibatch_size = minibatch_size
        self._seed = seed
        self._validation_split = ValidationSplit(model.config.embed_dim)
        self._checked_pixels = False

    @property
    def consumed_batches(self) -> int:
        """Global batches that have been trained on in this run."""
        return self._end_of_step.consumed_batches

    def configure_callbacks(self) -> list[L.Callback]:
        """What a bare ``Trainer`` needs too."""
        return [self._end_of_step, SkipReport()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and the cosine over the real number of optimizer steps."""
        num_steps = self.trainer.estimated_stepping_batches
        if not 0 < num_steps < float("inf"):
            raise UserError(
                "The length of the run is unknown, and the learning rate follows it: the loader has no length, or "
                "max_epochs is -1. Set the Trainer's max_steps."
            )
        num_steps, config = int(num_steps), self._optimizer_config
        warmup_steps = warmup_for(num_steps, config) if self._warmup_steps is None else self._warmup_steps
        optimizer = build_adamw(self.model, config, fused=self._fuses())
        schedule = build_schedule(optimizer, warmup_steps, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Score every image against every caption, as ``CLIP.forward``."""
        return self.model(images, tokens)

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Loss of this process's rows against the global batch, () float32."""
        images, tokens = self._read(batch)
        self._end_of_step.require_equal_shares(len(images))
        pairs = share(*self._embed(images, tokens))
        # Similarities in full precision: in bf16 a logit of 100 is off by up to a quarter.
        with torch.autocast(self.device.type, enabled=False):
            loss = clip_loss(pairs, self.model.logit_scale.exp())
        self._log_step(loss.detach(), pairs)
        return self._end_of_step.finite.note_loss(loss)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, which refuses to clip for fused optimizers in any mixed precision."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._end_of_step.finite.gradient_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then clamp the temperature."""
        super().optimizer_step(*args, **kwargs)
        self.model.clamp_temperature()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where a run is resumed, keep its update fused or not as its precision now wants it."""
        if resuming(self._trainer):
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    group |= {"fused": self._fuses()} if "fused" in group else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let no state be saved after a step that was not finite."""
        self._end_of_step.finite.read()

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        """Embed; the split is scored as a whole at its end."""
        if dataloader_idx:
            raise UserError("Found several validation loaders, expected one. ConcatDataset joins their data sets.")
        images, tokens = self._read(batch)
        missing = batch.missing if isinstance(batch, Batch) else ()
        self._validation_split.add(*self._embed(images, tokens), tokens, missing)

    def on_validation_epoch_end(self) -> None:
        """Loss over global batches of fixed size, and retrieval, over the whole split."""
        dataset = getattr(self.trainer.val_dataloaders, "dataset", None)
        figures = self._validation_split.score(self.model.logit_scale.exp(), dataset)
        # Every process has the same figures from the same gathered embeddings; the mean over them changes nothing.
        self.log_dict(figures, sync_dist=True)

    def _fuses(self) -> bool:
        """Whether the update is fused: under a scaler it would unscale after the gradient was looked at and clipped."""
        return self.trainer.strategy.root_device.type in ("cpu", "cuda") and gradient_scaler(self.trainer) is None

    def _read(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images, and (B, L) int64 tokens, of a batch of any accepted kind, on this module's device."""
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise UserError(
                f"A batch is a {type(batch).__name__}; expected a tuple or list that starts with images and texts. "
                "Give the loader a collate_fn that returns (images, texts)."
            )
        images, texts = batch[0], batch[1]
        if isinstance(texts, Mapping):
            if "input_ids" not in texts:
                raise UserError(
                    f"The texts of a batch have the keys {', '.join(texts)}; expected input_ids among them."
                )
            texts = texts["input_ids"]
        elif not isinstance(texts, Tensor):
            texts, _ = self.tokenizer.batch(list(texts))
        _check_shapes(images, texts, self.model.config)
        if not self._checked_pixels:
            self._checked_pixels = True
            _check_values(images, texts, self.model.config)
        return images.to(self.device), texts.to(self.device)

    def _embed(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm (B, D) embeddings of both sides, float32 or wider."""
        model, size = self.model, self._minibatch_size
        seed = (self._seed, self.consumed_batches, world()[0])
        image_embeddings = encode_in_chunks(model.encode_image, images, size, (*seed, IMAGE_TOWER), model.visual)
        text_embeddings = encode_in_chunks(model.encode_text, tokens, size, (*seed, TEXT_TOWER), model.transformer)
        return unit_norm(image_embeddings), unit_norm(text_embeddings)

    def _log_step(self, loss: Tensor, pairs: Pairs) -> None:
        """Log the global batch's figures, on the steps that reach a logger: reading them waits for the device."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every and (self.trainer.global_step + 1) % every == 0
        if not due and self.device.type != "cpu":
            return
        figures = {
            "train/loss": loss,
            "train/accuracy_image_to_text": accuracy(pairs.images, pairs.all_texts, pairs.offset),
            "train/accuracy_text_to_image": accuracy(pairs.texts, pairs.all_images, pairs.offset),
            "train/logit_scale": self.model.logit_scale.detach().exp(),
            "train/learning_rate": torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"], device=self.device),
        }
        self.log_dict(figures, sync_dist=True, batch_size=len(pairs.images))


def share(images: Tensor, texts: Tensor) -> Pairs:
    """Gather everyone's embeddings, with gradient, around this process's.

    Args:
        images: (B, D) float, unit norm.
        texts: (B, D) float, unit norm.
    """
    return Pairs(images, texts, gather_with_gradient(images), gather_with_gradient(texts), world()[0] * len(images))


def unit_norm(embeddings: Tensor) -> Tensor:
    """Scale (B, D) rows to length 1, in float32 or wider."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def _check_shapes(images: Tensor, tokens: Tensor, config: ModelConfig) -> None:
    size, context = config.image.size, config.text.context
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise UserError(
            f"A batch's images have shape {tuple(images.shape)}; {config.name} expects (B, 3, {size}, {size}). "
            "Resize them, or build the model for their size (--image_size, or config.with_image_size)."
        )
    if tokens.ndim != 2 or len(tokens) != len(images) or tokens.shape[1] > context:
        raise UserError(
            f"A batch's tokens have shape {tuple(tokens.shape)} beside {len(images)} images; {config.name} expects one "
            f"row an image, of {context} tokens at most. Cut longer captions, keeping their end token."
        )


def _check_values(images: Tensor, tokens: Tensor, config: ModelConfig) -> None:
    """Look at the first batch's values, once: it waits for the device."""
    if int(tokens.max()) >= config.text.vocab or int(tokens.min()) < 0:
        raise UserError(
            f"Token ids run from {int(tokens.min())} to {int(tokens.max())}; {config.name} has a vocabulary of "
            f"{config.text.vocab:,}. Use CLIP's tokenizer, or batches of plain strings."
        )
    if len(tokens.amax(dim=1).unique()) > 1:
        raise UserError(
            f"The largest token of a caption is not the same in all of them, but {config.name} reads its text feature "
            "at the end token, the largest of CLIP's tokens. Use CLIP's tokenizer, or batches of plain strings."
        )
    if images.is_floating_point() and (images.min() >= 0 or images.abs().max() > LARGEST_NORMALISED):
        rank_zero_warn(
            f"The first batch's images are floating point from {images.min():.3g} to {images.max():.3g}. Floats are "
            "taken as already normalised by mean and deviation, and these do not look it. Pass uint8 to have it done."
        )
