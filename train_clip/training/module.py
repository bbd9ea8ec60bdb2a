"""The LightningModule: two encoders, the contrastive objective, and the step shared by all kinds of training.

B  pairs on this process      W  processes      N  pairs of the global batch (W · B), or of whoever embeds
D  embedding width      S  side of the image in pixels
"""

import warnings
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import model_helpers, rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from train_clip.checkpoints import found, own, state_dicts
from train_clip.data import augment
from train_clip.errors import UserError
from train_clip.evaluation import embed
from train_clip.gather import world
from train_clip.keywords import OptionsByName
from train_clip.losses import Pairs, softmax
from train_clip.models import clip, config, switches
from train_clip.options import LOSSES, AugmentationOptions, TrainingOptions
from train_clip.training import ema, encode, end_of_step, half_precision, same_run, skips, validation
from train_clip.training import lightning_internals as internals
from train_clip.training.batch import BatchReader
from train_clip.training.optimizer import build_optimizer, cosine_with_warmup, usual_rate, warmup_for

BIAS = "logit_bias"
FLOAT32_WEIGHTS, HALF = ("32-true", "16-mixed", "bf16-mixed"), ("bf16-true", "16-true")


class ContrastiveModule(L.LightningModule):
    """Trains a model of two towers on batches that start with images and texts, under any ``Trainer``, with any loader.

    Images are uint8, or float that is already normalized; texts are token tensors (B, L), lists of strings, or a
    tokenizer's mapping with ``input_ids``. ``preset`` fills in what the options leave open.
    """

    __signature__ = OptionsByName(*TrainingOptions.groups().values())
    tokenizer: Any = None  # for captions that are strings: its ``batch`` gives tokens, and how many captions were cut
    names_of_model: tuple[str, ...] = ()  # arguments; the others say how it is trained
    # What may differ when a run goes on: the rest is in its state already, and another value would go unheard.
    free_to_change: tuple[str, ...] = ("minibatch_size", "kept_minibatches", "gradient_checkpointing", "compile")

    def __init__(self, model: clip.DualEncoder, preset: config.OptimizerConfig, options: TrainingOptions) -> None:
        super().__init__()
        # Beside a data module the module's own hook is as welcome as anywhere.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        self.model, self.preset, self._reader = model, preset, BatchReader(model)
        usual = {"optimizer": "adamw", "distillation": "none", "loss": "softmax"} | preset.options()
        options = TrainingOptions.of(options.flat(), **usual)
        self.options = options
        towers, objective = options.towers, options.objective
        model.lock(towers.lock_image, towers.lock_text)
        if {parameter for parameter in model.parameters() if parameter.requires_grad} <= {*model.temperature()}:
            raise UserError(
                "Both towers are locked and there is no projection: only the temperature would be trained. Leave out "
                "lock_image or lock_text."
            )
        self.distillation = ema.Distillation(model, str(towers.distillation)) if towers.distils else None
        self.ema = ema.WeightsEMA(model, options.optimizer.ema) if options.optimizer.ema else None
        for name, tower in (("image", model.visual), ("text", model.transformer)):
            if any(parameter.requires_grad for parameter in tower.parameters()):
                switches.recompute_blocks(tower, options.step.gradient_checkpointing)
                switches.skip_blocks(tower, name, objective.stochastic_depth)
        self._kept_patches = switches.patches_to_keep(model.visual, objective.mask_ratio)
        build_optimizer(self, model, options)  # refuses a model that has no layers, or nothing for Muon
        self._towers = encode.Towers(model, options)
        self._end_of_step = end_of_step.EndOfStep()
        self._augments = options.augmentation != AugmentationOptions()
        self._mask_equal = objective.equal_captions == "mask"
        self._loss = resolve_name(LOSSES[str(objective.loss)])
        scored = [model] if self.ema is None else [model, self.ema.model]
        self._splits = [(validation.ValidationSplit(model.embed_dim, self._loss), one) for one in scored]

    @override
    def training_step(self, batch: Any, _: int) -> Tensor:
        """Loss of this process's pairs against the global batch, () float32 (CLIP paper, figure 3)."""
        inputs = self._reader.read(batch, self.device, self.tokenizer)
        self._end_of_step.require_equal_shares(len(inputs.images))
        if len(inputs.images) * world()[1] == 1:
            raise UserError(
                "A batch holds one pair, which has no other to be told from: there is nothing to learn from it. "
                "Increase the loader's batch_size, or leave out its incomplete batch (drop_last=True)."
            )
        if self._augments:
            inputs = inputs._replace(images=self._augmented(inputs.images))
        images, texts = self._towers.embed(self.model, inputs, self.consumed_batches)
        pairs = encode.share(images, texts, inputs.captions)
        if self.distillation is not None:
            with torch.no_grad():
                taught = self._towers.embed(self.distillation.teacher.model, inputs, self.consumed_batches)
        # Similarities in full precision: in bf16 a logit of 100 is off by up to a quarter.
        with torch.autocast(self.device.type, enabled=False):
            scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
            parts = {"contrastive_loss": self._loss.of(pairs, scale, bias, self._mask_equal)}
            if self.distillation is not None:
                parts["distillation_loss"] = self.options.towers.kl_coeff * self.distillation(pairs, *taught)
            loss = torch.stack(list(parts.values())).sum()
        self._log_step(loss, parts, pairs)
        return self._end_of_step.finite.note_loss(loss)

    def _augmented(self, images: Tensor) -> Tensor:
        # By draws that depend on the seed, the batch and an image's place in it alone.
        how, (rank, processes) = self.options.augmentation, world()
        rows = slice(rank * len(images), (rank + 1) * len(images))
        draws = augment.draw_batch(how, (self.options.step.seed, self.consumed_batches), rows, processes * len(images))
        return augment.augment(images, how, draws.on(images.device))

    @torch.no_grad()
    def _log_step(self, loss: Tensor, parts: dict[str, Tensor], pairs: Pairs) -> None:
        # On the steps that reach a logger: reading the figures waits for the device.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.device.type != "cpu" and not (every and (self.trainer.global_step + 1) % every == 0):
            return
        floor = 0.0 if self._mask_equal else self._loss.floor(pairs.captions)
        figures: dict[str, Any] = {
            "loss": loss,
            "loss_above_floor": parts["contrastive_loss"] - floor,
            "accuracy_image_to_text": softmax.accuracy(pairs.images, pairs.all_texts, pairs.offset, pairs.captions),
            "accuracy_text_to_image": softmax.accuracy(pairs.texts, pairs.all_images, pairs.offset, pairs.captions),
            "logit_scale": self.model.logit_scale.exp(),
            "learning_rate": usual_rate(self.trainer.optimizers[0], self.options.optimizer.learning_rate),
        }
        if self.model.logit_bias is not None:
            figures["logit_bias"] = self.model.logit_bias
        if self.distillation is not None:
            figures |= parts | {"distillation_scale": self.distillation.log_scale.exp()}
        figures = {f"train/{name}": figure for name, figure in figures.items()} | self._epoch()
        self.log_dict(figures, sync_dist=True, batch_size=len(pairs.images))

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        # What the towers look at in this step, and in the recomputation of its backward pass.
        if self._kept_patches:
            num_steps = self._end_of_step.num_steps
            whole = self.trainer.global_step >= num_steps - round(self.options.objective.unmasked_share * num_steps)
            self.model.visual.kept_patches = 0 if whole else self._kept_patches

    @override
    def configure_optimizers(self) -> Any:
        num_steps = self.trainer.estimated_stepping_batches
        if not 0 < num_steps < float("inf"):
            raise UserError(
                "The learning rate schedule needs the length of the run, which is unknown: the loader has no length, "
                "or max_epochs is -1. Set the Trainer's max_steps."
            )
        warmup_steps = self.options.optimizer.warmup_steps
        if warmup_steps is None:
            warmup_steps = warmup_for(int(num_steps), self.preset)
        optimizer = build_optimizer(self, self.model, self.options, self._fuses())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(warmup_steps, int(num_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _fuses(self) -> bool:
        # Under a scaler a fused update would unscale after the gradient was looked at and clipped.
        has_scaler = internals.gradient_scaler(self.trainer) is not None
        return self.trainer.strategy.root_device.type in ("cpu", "cuda") and not has_scaler

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # As Lightning does, which refuses to clip for fused optimizers in any mixed precision.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._end_of_step.finite.gradient_norm)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # A step that the scaler skipped is no update. One that is held back on a GPU ends the run, and is never saved.
        if self._end_of_step.finite.skipped_in_a_row:
            return
        self.model.clamp_temperature()
        if self.distillation is not None:
            self.distillation.after_update(self.model)
        if self.ema is not None:
            self.ema.follow(self.model)

    @override
    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx:
            raise UserError("Found several validation loaders, expected one. ConcatDataset joins their data sets.")
        inputs = self._reader.read(batch, self.device, self.tokenizer)
        missing = getattr(batch, "missing", ())  # of this package's loaders
        for split, model in self._splits:
            split.add(*self._towers.embed(model, inputs, self.consumed_batches), inputs.captions, missing)

    @override
    def on_validation_epoch_end(self) -> None:
        # The split is scored as a whole: its loss over global batches of fixed size, and retrieval.
        dataset = getattr(self.trainer.val_dataloaders, "dataset", None)
        for split, model in self._splits:
            figures = split.score(model.logit_scale.exp(), dataset, model.logit_bias)
            if model is not self.model:
                figures = {ema.ema_figure(name): value for name, value in figures.items()}
            # Every process has the same figures from the same gathered embeddings; the mean over them changes nothing.
            self.log_dict(figures | self._epoch(), sync_dist=True)

    def _epoch(self) -> dict[str, float]:
        # Counted from 1, as in messages: where there is none, Lightning logs one that is counted from 0.
        return {"epoch": self.current_epoch + 1.0}

    @override
    def forward(self, images: Tensor, texts: clip.Texts) -> tuple[Tensor, Tensor]:
        """Score every image against every caption, as ``DualEncoder.forward``."""
        with self._float32():
            return self.model(images, texts)

    def embed_images(
        self, images: embed.Picture | Sequence[embed.Picture] | Tensor, batch_size: int = embed.EMBED_AT_ONCE
    ) -> Tensor:
        """Embed images in eval mode, so many at a time, to (N, D) float32, unit norm, on this module's device.

        ``images`` are paths or pictures, one or several, which are resized and center-cropped, or a tensor
        (N, 3, S, S), uint8 or already normalized. An image's embedding times a caption's is their similarity.
        """
        with self._float32():
            return embed.embed_images(self.model, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int = embed.EMBED_AT_ONCE) -> Tensor:
        """Embed captions likewise, one or several; what is over the context length is cut."""
        with self._float32():
            return embed.embed_texts(
                self.model, texts, lambda some: self._reader.tokens(some, self.device, self.tokenizer), batch_size
            )

    def _float32(self) -> Any:
        # Some weights may be kept in bfloat16 while the model trains.
        return encode.WeightSubstitutes(self.model, self.options.optimizer.has_half_weights).in_place()

    @property
    def consumed_batches(self) -> int:
        """Global batches that have been trained on in this run."""
        return self._end_of_step.consumed_batches

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            if internals.is_compiled(self):
                raise UserError(
                    "The module went through torch.compile, whose graph does not hold a step over several processes "
                    "or minibatches. Pass the module itself to the Trainer, made with compile=True (--compile)."
                )
            self.require_precision(self.trainer.precision)
            if self.options.step.compile:
                switches.compile_tower(self.model.visual, dynamic=False)
                switches.compile_tower(self.model.transformer, dynamic=True)
            pairs = getattr(getattr(self.trainer, "datamodule", None), "training_pairs", None)
            for warning in augment.warnings_of_flips(self.options.augmentation, pairs):
                rank_zero_warn(warning)

    @override
    def configure_model(self) -> None:
        # Before training: keep in bfloat16 what is to be, whatever was loaded; everywhere else it is float32.
        if internals.resuming(internals.trainer_of(self)):
            half_precision.narrow(self.model, self.options.optimizer)

    @override
    def teardown(self, stage: str) -> None:
        # After training: give the model back in float32, and looking at whole images.
        if self._kept_patches:
            self.model.visual.kept_patches = 0
        half_precision.widen(self.model, self.options.optimizer)

    @override
    def configure_callbacks(self) -> Any:
        return [self._end_of_step, skips.SkipReport()]

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Measure the captions while they are on the host, unless someone changes the batch on its way.
        owners = self, getattr(self.trainer, "datamodule", None)
        later = "transfer_batch_to_device", "on_after_batch_transfer"
        if not any(model_helpers.is_overridden(hook, owner) for owner in owners for hook in later):
            self._reader.measure(batch)
        return batch

    @override
    def on_load_checkpoint(self, checkpoint: dict) -> None:
        # Where a run is resumed, hold this module against the one that it began with; fuse as the precision wants.
        self._towers.fixed_texts.clear()
        if "state_dict" in checkpoint:  # of a model that was wrapped or compiled, or that is here
            checkpoint["state_dict"] = state_dicts.renamed(checkpoint["state_dict"], self.state_dict())
        if internals.resuming(internals.trainer_of(self)):
            if own.RUNNING_MEAN in checkpoint:
                raise UserError(f"The checkpoint {own.NO_STATE}")
            self.require_same_model(checkpoint.get("hyper_parameters", {}))
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    if "fused" in group:
                        group["fused"] = self._fuses()

    @override
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self._end_of_step.finite.read()  # no state is saved after a step that was not finite

    def begin_with(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Begin with a state dict of the model, which fits but for the bias of another loss; EMAs begin with it too."""
        if self.model.logit_bias is not None and BIAS not in weights:
            rank_zero_info(
                f"{source}: has no {BIAS}, so it was not trained with the sigmoid loss. Temperature and bias start as "
                "from scratch, at a scale of 10 and at -10."
            )
            weights = {**weights} | {name: torch.tensor(value) for name, value in config.START_OF_SIGMOID.items()}
        elif self.model.logit_bias is None and BIAS in weights:
            rank_zero_info(f"{source}: its {BIAS}, of the sigmoid loss, is dropped: the softmax loss has none.")
            weights = {name: value for name, value in weights.items() if name != BIAS}
        found.fill(self.model, weights, source)
        self._towers.fixed_texts.clear()
        for mean in self._means():
            mean.model.load_state_dict(weights)

    def _means(self) -> list[ema.WeightsEMA]:
        return [module for module in self.modules() if isinstance(module, ema.WeightsEMA)]

    def require_batch_size(self, num_pairs: int) -> None:
        """Refuse a global batch of N pairs for which distillation would need matrices that are too large."""
        if self.distillation is not None:
            ema.require_room(num_pairs)

    def require_precision(self, precision: str) -> None:
        """Refuse a Trainer's precision in which an EMA would stand still, or half weights be another thing."""
        optimizer, step = self.options.optimizer, self.options.step
        if optimizer.keeps_halves and precision not in FLOAT32_WEIGHTS:
            raise UserError(
                f"--precision {precision}: --half_weights and --adam_statistics need float32 weights. Use one of "
                f"{', '.join(FLOAT32_WEIGHTS)}, or leave out the two options."
            )
        if optimizer.has_half_weights and step.gradient_checkpointing and precision != "bf16-mixed":
            raise UserError(
                f"--precision {precision}: gradient checkpointing uses half weights directly, which works in "
                "bf16-mixed only. Use bf16-mixed, or one of --half_weights and "
                "--gradient_checkpointing."
            )
        if self._means() and precision in HALF:
            raise UserError(
                f"--precision {precision}: in half precision an EMA of the weights, and so the teacher, would not "
                "change. Use bf16-mixed or 16-mixed, or --distillation none and --ema 0."
            )

    def require_same_model(self, kept: Mapping[str, Any]) -> None:
        """Hold this module's arguments against those that a run began with, ``hparams`` of another module."""
        # An option that is newer than the checkpoint had its default, or (None) what the preset decides.
        defaults = TrainingOptions().flat() | {"loss": "softmax"}
        usual = {name: self.hparams.get(name) if value is None else value for name, value in defaults.items()}
        same_run.require_same(
            self.hparams,
            usual | dict(kept),
            "The run started with another model or optimizer (found {found}), and its checkpoint holds their state. "
            "Use the earlier values, or leave them out; to train with others start a new run.",
            self.free_to_change,
        )
