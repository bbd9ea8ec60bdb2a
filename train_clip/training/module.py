"""The one LightningModule: two encoders, the contrastive objective, and the step that every kind of training shares.

B  pairs on this process      W  processes      N  pairs of the global batch (W · B)      D  embedding width

Weights that were trained with one loss, as a model that is trained with the other begins with them.

What a module is to those who do not train it: scores and embeddings of images and captions.

D  embedding width

What a training step tells of a batch, beside its loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train_clip.checkpoints.found import fill
from train_clip.checkpoints.own import NO_STATE, RUNNING_MEAN
from train_clip.errors import UserError
from train_clip.evaluation.embed import EMBED_AT_ONCE, Picture, embed_images, embed_texts
from train_clip.losses import LOSSES
from train_clip.losses.softmax import Pairs, accuracy
from train_clip.models.blocks import recompute_blocks
from train_clip.models.clip import DualEncoder, Texts
from train_clip.models.config import START_OF_SIGMOID, OptimizerConfig
from train_clip.options import TrainingOptions
from train_clip.training.batch import BatchReader, Inputs, augmented, warn_of_flips
from train_clip.training.compile import compile_towers
from train_clip.training.distillation import Distillation, require_room
from train_clip.training.dropping import PatchDropping, skip_blocks
from train_clip.training.ema import WeightsEMA, ema_figure
from train_clip.training.encode import StandIns, TowerRuns, share
from train_clip.training.end_of_step import EndOfStep
from train_clip.training.half_precision import narrow, widen
from train_clip.training.lightning_internals import gradient_scaler, resuming, trainer_of
from train_clip.training.optimizer import build_optimizer, cosine_with_warmup, usual_rate, warmup_for
from train_clip.training.same_run import completed, require_same
from train_clip.training.skips import SkipReport
from train_clip.training.validation import ValidationSplit
from train_clip.types import Batch

BIAS = "logit_bias"


def begun_with(model: DualEncoder, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Add what the sigmoid loss begins with, or leave out the bias, which the softmax loss has not; say which.

    Args:
        model: that is to be trained.
        weights: a state dict, of the model but for the bias.
        source: named in the line.
    """
    begun = dict(weights)
    if model.logit_bias is not None and BIAS not in weights:
        rank_zero_info(
            f"{source}: has no {BIAS}, so that it was not trained with the sigmoid loss. Temperature and bias begin as "
            "from scratch, at a scale of 10 and at -10."
        )
        begun |= {name: torch.tensor(value) for name, value in START_OF_SIGMOID.items()}
    elif model.logit_bias is None and BIAS in weights:
        rank_zero_info(f"{source}: its {BIAS}, of the sigmoid loss, is left out: the softmax loss has none.")
        del begun[BIAS]
    return begun


class EmbeddingModule(L.LightningModule):
    """Embeds by a model of two towers.

    Args:
        model: both towers and the temperature.
        halves: whether some of its weights are kept in bfloat16 while it trains.
    """

    def __init__(self, model: DualEncoder, halves: bool) -> None:
        super().__init__()
        self.model = model
        self._reader = BatchReader(model, None)
        self._halves = halves

    @property
    def tokenizer(self) -> Any:
        """For captions that are strings: its ``batch`` gives tokens, and the number of captions that were cut."""
        return self._reader.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._reader.tokenizer = tokenizer

    def forward(self, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Score every image against every caption, as ``DualEncoder.forward``."""
        with StandIns(self.model, self._halves).in_place():
            return self.model(images, texts)

    def embed_images(self, images: Picture | Sequence[Picture] | Tensor, batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed images for search and comparison, with the model in eval mode.

        Args:
            images: paths or pictures, one or several, which are resized and centre-cropped; or a tensor (N, 3, S, S),
                uint8 or already normalised.
            batch_size: images at a time.

        Returns:
            (N, D) float32, unit norm, on this module's device. The similarity of an image and a caption is the product
            of their embeddings.

        Raises:
            BadSample: a file that cannot be read as an image.
        """
        with StandIns(self.model, self._halves).in_place():
            return embed_images(self.model, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed captions, with the model in eval mode.

        Args:
            texts: one caption or several; what is over the context length is cut.
            batch_size: captions at a time.

        Returns:
            (N, D) float32, unit norm, on this module's device.
        """
        with StandIns(self.model, self._halves).in_place():
            return embed_texts(self.model, texts, lambda some: self._reader.tokens(some, self.device), batch_size)


def step_figures(
    pairs: Pairs, parts: Mapping[str, Tensor], floor: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """The loss above its floor, the accuracies, and the loss's parts where it has several.

    Args:
        pairs: of the batch, which captions are equal among it.
        parts: () float32 each: ``contrastive_loss``, and what is added to it.
        floor: maps the captions to the least that the loss can be; None where it is 0, equal captions being left out.

    Returns:
        () float32 each, by the names that they have in a log.
    """
    assert pairs.captions is not None
    least = 0.0 if floor is None else floor(pairs.captions)
    figures = {
        "train/loss_above_floor": parts["contrastive_loss"].detach() - least,
        "train/accuracy_image_to_text": accuracy(pairs.images, pairs.all_texts, pairs.offset, pairs.captions),
        "train/accuracy_text_to_image": accuracy(pairs.texts, pairs.all_images, pairs.offset, pairs.captions),
    }
    if len(parts) > 1:
        figures |= {f"train/{name}": part.detach() for name, part in parts.items()}
    return figures


def learned_figures(model: DualEncoder, distillation: Distillation | None) -> dict[str, Tensor]:
    """The temperature, and the bias and the temperature towards the teacher where there are such.

    Args:
        model: that is trained.
        distillation: of it, if any.

    Returns:
        () each, by the names that they have in a log.
    """
    figures = {"train/logit_scale": model.logit_scale.detach().exp()}
    if model.logit_bias is not None:
        figures["train/logit_bias"] = model.logit_bias.detach()
    if distillation is not None:
        figures["train/distillation_scale"] = distillation.log_scale.detach().exp()
    return figures


LATER_HOOKS = ("transfer_batch_to_device", "on_after_batch_transfer")  # than the one that measures captions

# Under a Trainer with this package's data module the hook below is as welcome as anywhere.
warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")


FLOAT32_WEIGHTS = ("32-true", "16-mixed", "bf16-mixed")
HALF = ("bf16-true", "16-true")


class ContrastiveModule(EmbeddingModule):
    """Trains a model of two towers on batches that start with images and texts.

    Works under any ``Trainer`` and with any loader. Images are uint8, or float that is already normalised; texts are
    token tensors (B, L), lists of strings, or a tokenizer's mapping with ``input_ids``.

    Args:
        model: both towers and the temperature.
        preset: what the optimizer options leave open, and the warm-up.
        options: how it is trained; with the preset's values in ``self.options``.
    """

    # Arguments that say what model it is; the others say how it is trained.
    names_of_model: ClassVar[tuple[str, ...]] = ()
    # What may differ when a run goes on: the rest is in its state already, and another value would go unheard.
    free_to_change: ClassVar[tuple[str, ...]] = (
        *("minibatch_size", "kept_minibatches", "gradient_checkpointing", "compile"),
    )

    def __init__(self, model: DualEncoder, preset: OptimizerConfig, options: TrainingOptions) -> None:
        super().__init__(model, options.optimizer.has_half_weights)
        self.options = options = TrainingOptions.of(
            options.flat(),
            optimizer="adamw",
            distillation="none",
            learning_rate=preset.lr,
            **{name: getattr(preset, name) for name in ("weight_decay", "betas", "eps")},
        )
        towers, objective, step = options.towers, options.objective, options.step
        model.lock(towers.lock_image, towers.lock_text)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if {id(parameter) for parameter in trained} <= {id(parameter) for parameter in model.temperature()}:
            raise UserError(
                "Both towers are locked and nothing joins them: only the temperature would be trained. Leave out "
                "lock_image or lock_text."
            )
        self.distillation = Distillation(model, str(towers.distillation)) if towers.distils else None
        self.ema = WeightsEMA(model, options.optimizer.ema) if options.optimizer.ema else None
        for tower in (model.visual, model.transformer):
            if step.gradient_checkpointing and any(parameter.requires_grad for parameter in tower.parameters()):
                recompute_blocks(tower, step.gradient_checkpointing)
        self._patches = PatchDropping(model, objective)
        skip_blocks(model, objective.stochastic_depth)
        build_optimizer(self, model, options)  # refuses a model that has no layers, or nothing for Muon
        self._towers = TowerRuns(self._reader, step, options.optimizer.has_half_weights, step.seed)
        self._preset = preset
        self._end_of_step = EndOfStep()
        self._loss = LOSSES[objective.loss]
        self._validation_split, self._ema_split = (ValidationSplit(model.embed_dim, self._loss) for _ in range(2))

    def begin_with(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Begin with weights of the model, the running means of it with them too.

        Args:
            weights: a state dict of the model, which has to fit it strictly but for the bias of another loss.
            source: named in messages.

        Raises:
            UserError: it does not fit.
        """
        weights = begun_with(self.model, weights, source)
        fill(self.model, weights, source)
        self._towers.forget()
        for mean in self._means():
            mean.model.load_state_dict(weights)

    def require_batch_size(self, num_pairs: int) -> None:
        """Refuse a global batch that is too large for what is minimised.

        Args:
            num_pairs: N.

        Raises:
            UserError: distillation would need matrices that are too large.
        """
        if self.distillation is not None:
            require_room(num_pairs)

    def require_precision(self, precision: str) -> None:
        """Refuse a Trainer's precision in which an EMA would stand still, or half weights be another thing.

        Raises:
            UserError: it is one, for what is trained.
        """
        optimizer, step = self.options.optimizer, self.options.step
        if optimizer.keeps_halves and precision not in FLOAT32_WEIGHTS:
            raise UserError(
                f"--precision {precision}: --half_weights and --adam_statistics are for weights that are float32 "
                f"otherwise. Use one of {', '.join(FLOAT32_WEIGHTS)}, or leave the two options out."
            )
        if optimizer.has_half_weights and step.gradient_checkpointing and precision != "bf16-mixed":
            raise UserError(
                f"--precision {precision}: blocks that are recomputed take half weights as they are, which bf16-mixed "
                "does too, and other precisions do not. Use bf16-mixed, or one of --half_weights and "
                "--gradient_checkpointing."
            )
        if self._means() and precision in HALF:
            raise UserError(
                f"--precision {precision}: in half precision an EMA of the weights stands still, and with it the "
                "teacher. Use bf16-mixed or 16-mixed, or --distillation none and --ema 0."
            )

    def setup(self, stage: str) -> None:
        """Hold the Trainer against what is minimised."""
        if stage == "fit":
            self.require_precision(self.trainer.precision)
            if self.options.step.compile:
                compile_towers(self.model)
            warn_of_flips(self.options.augmentation, getattr(self.trainer, "datamodule", None))

    def configure_model(self) -> None:
        """Before training: keep in bfloat16 what is to be, whatever was loaded; everywhere else it is float32."""
        if resuming(trainer_of(self)):
            narrow(self.model, self.options.optimizer)

    def teardown(self, stage: str) -> None:
        """After training: give the model back in float32, and looking at whole images."""
        self._patches.end()
        widen(self.model, self.options.optimizer)

    @property
    def consumed_batches(self) -> int:
        """Global batches that have been trained on in this run."""
        return self._end_of_step.consumed_batches

    def configure_callbacks(self) -> list[L.Callback]:
        """What a bare ``Trainer`` needs too."""
        return [self._end_of_step, SkipReport()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the cosine over the real number of optimizer steps."""
        num_steps = self.trainer.estimated_stepping_batches
        if not 0 < num_steps < float("inf"):
            raise UserError(
                "The length of the run is unknown, and the learning rate follows it: the loader has no length, or "
                "max_epochs is -1. Set the Trainer's max_steps."
            )
        num_steps, asked = int(num_steps), self.options.optimizer.warmup_steps
        warmup_steps = warmup_for(num_steps, self._preset) if asked is None else asked
        optimizer = build_optimizer(self, self.model, self.options, self._fuses())
        schedule = LambdaLR(optimizer, cosine_with_warmup(warmup_steps, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Measure the captions while they are on the host, unless someone changes the batch on its way."""
        owners = [owner for owner in (self, getattr(trainer_of(self), "datamodule", None)) if owner is not None]
        if not any(is_overridden(hook, owner) for hook in LATER_HOOKS for owner in owners):
            self._reader.measure(batch)
        return batch

    def on_train_batch_start(self, *_: Any) -> None:
        """Settle what the towers look at in this step, and in the recomputation of its backward pass."""
        self._patches.begin_step(self.trainer.global_step, self._end_of_step.num_steps)

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Loss of this process's rows against the global batch, () float32."""
        inputs = self._reader.read(batch, self.device)
        self._end_of_step.require_equal_shares(len(inputs.images))
        images = augmented(inputs.images, self.options.augmentation, self.options.step.seed, self.consumed_batches)
        inputs = inputs._replace(images=images)
        pairs = share(*self._towers.embed(self.model, inputs, self.consumed_batches), inputs.captions)
        taught = self._embed_by_teacher(inputs, len(pairs.all_images))
        # Similarities in full precision: in bf16 a logit of 100 is off by up to a quarter.
        with torch.autocast(self.device.type, enabled=False):
            mask = self.options.objective.equal_captions == "mask"
            scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
            parts = {"contrastive_loss": self._loss.of(pairs, scale, bias, mask)}
            if self.distillation is not None:
                parts["distillation_loss"] = self.options.towers.kl_coeff * self.distillation(pairs, *taught)
            loss = torch.stack(list(parts.values())).sum()
        self._log_step(loss.detach(), parts, pairs)
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
        """Update, clamp the temperature, let the running means follow."""
        super().optimizer_step(*args, **kwargs)
        # A step that the scaler skipped is no update. One that is held back on a GPU ends the run, and is never saved.
        if self._end_of_step.finite.skipped_in_a_row:
            return
        self.model.clamp_temperature()
        if self.distillation is not None:
            self.distillation.after_update(self.model)
        if self.ema is not None:
            self.ema.follow(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where a run is resumed, hold this module against the one that it began with; fuse as the precision wants."""
        self._towers.forget()
        if resuming(trainer_of(self)):
            if RUNNING_MEAN in checkpoint:
                raise UserError(f"The checkpoint {NO_STATE}")
            self.require_same_model(checkpoint.get("hyper_parameters", {}))
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    group |= {"fused": self._fuses()} if "fused" in group else {}

    def require_same_model(self, kept: Mapping[str, Any]) -> None:
        """Hold this module's arguments against those that a run began with.

        Args:
            kept: another module's ``hparams``.

        Raises:
            UserError: the model is another, or so is how it is trained.
        """
        require_same(
            self.hparams,
            completed(kept, self.hparams),
            "The run began with another model or optimizer (found {found}), and its checkpoint holds their state. Give "
            "the earlier values, or leave them out; to train with others begin a new run.",
            self.free_to_change,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let no state be saved after a step that was not finite."""
        self._end_of_step.finite.read()

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        """Embed; the split is scored as a whole at its end."""
        if dataloader_idx:
            raise UserError("Found several validation loaders, expected one. ConcatDataset joins their data sets.")
        inputs = self._reader.read(batch, self.device)
        missing = batch.missing if isinstance(batch, Batch) else ()
        embeddings = self._towers.embed(self.model, inputs, self.consumed_batches)
        self._validation_split.add(*embeddings, inputs.captions, missing)
        if self.ema is not None:
            embeddings = self._towers.embed(self.ema.model, inputs, self.consumed_batches)
            self._ema_split.add(*embeddings, inputs.captions, missing)

    def on_validation_epoch_end(self) -> None:
        """Loss over global batches of fixed size, and retrieval, over the whole split."""
        dataset = getattr(self.trainer.val_dataloaders, "dataset", None)
        figures = self._validation_split.score(self.model.logit_scale.exp(), dataset, self.model.logit_bias)
        if self.ema is not None:
            mean = self.ema.model
            of_ema = self._ema_split.score(mean.logit_scale.exp(), dataset, mean.logit_bias)
            figures |= {ema_figure(name): value for name, value in of_ema.items()}
        # Every process has the same figures from the same gathered embeddings; the mean over them changes nothing.
        self.log_dict(figures, sync_dist=True)

    def _means(self) -> list[WeightsEMA]:
        """Of the model: the teacher, and the one that ``--ema`` asks for."""
        teacher = None if self.distillation is None else self.distillation.teacher
        return [mean for mean in (teacher, self.ema) if mean is not None]

    def _fuses(self) -> bool:
        """Whether the update is fused: under a scaler it would unscale after the gradient was looked at and clipped."""
        return self.trainer.strategy.root_device.type in ("cpu", "cuda") and gradient_scaler(self.trainer) is None

    @torch.no_grad()
    def _embed_by_teacher(self, inputs: Inputs, num_pairs: int) -> tuple[Tensor, ...]:
        """What the teacher makes of a batch; nothing without one."""
        if self.distillation is None:
            return ()
        require_room(num_pairs)
        return self._towers.embed(self.distillation.teacher.model, inputs, self.consumed_batches)

    def _log_step(self, loss: Tensor, parts: dict[str, Tensor], pairs: Pairs) -> None:
        """Log the global batch's figures, on the steps that reach a logger: reading them waits for the device."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every and (self.trainer.global_step + 1) % every == 0
        if not due and self.device.type != "cpu":
            return
        mask = self.options.objective.equal_captions == "mask"
        figures = step_figures(pairs, parts, None if mask else self._loss.floor)
        rate = usual_rate(self.trainer.optimizers[0], self.options.optimizer.learning_rate)
        figures |= learned_figures(self.model, self.distillation)
        figures |= {"train/loss": loss, "train/learning_rate": torch.tensor(rate, device=self.device)}
        self.log_dict(figures, sync_dist=True, batch_size=len(pairs.images))
