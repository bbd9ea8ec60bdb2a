"""CLIP from scratch: a preset or a configuration, and the module that trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from train_clip.data.images import open_rgb, upright_rgb
from train_clip.data.transforms import center_crop, to_tensor
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import ModelConfig, config_from_dict, read_config
from train_clip.training.module import ContrastiveModule, unit_norm
from train_clip.training.trainer_state import resuming

EMBED_AT_ONCE = 64  # images or captions

# What the state of a run holds already, so that another value would go unheard.
KEPT = ("learning_rate", "weight_decay", "betas", "eps", "warmup_steps", "seed")

Picture = str | Path | Image.Image


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

    Raises:
        UserError: an unknown preset, or a configuration that does not fit together.
    """

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
    ) -> None:
        if config is None:
            config = read_config(model_name)
        elif isinstance(config, dict):
            config = config_from_dict({"name": model_name} | config, model_name)
        for name, value in (("minibatch_size", minibatch_size), ("warmup_steps", warmup_steps or 0), ("seed", seed)):
            if value < 0:
                raise UserError(f"{name} is {value}; expected 0 or above.")
        given = {
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "betas": None if betas is None else tuple(betas),
            "eps": eps,
        }
        told = {name: value for name, value in given.items() if value is not None}
        optimizer = dataclasses.replace(config.optimizer, **told)  # type: ignore[arg-type]
        super().__init__(CLIP(config), optimizer, warmup_steps, minibatch_size, seed)
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
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where a run is resumed, hold this module against the one that it began with."""
        super().on_load_checkpoint(checkpoint)
        if resuming(self._trainer):
            self.require_same_model(checkpoint.get("hyper_parameters", {}))

    def require_same_model(self, kept: Mapping[str, Any]) -> None:
        """Hold this module's numbers against those that a run began with.

        Args:
            kept: another module's ``hparams``.

        Raises:
            UserError: the model is another, or so are numbers of the optimizer, which keeps its earlier ones.
        """
        changed = [name for name in self.hparams if name in KEPT and kept.get(name) != self.hparams[name]]
        if kept.get("config", {}) != self.hparams["config"]:
            changed = [f"the model {self.hparams['model_name']}, was {kept.get('model_name', 'of another kind')}"]
        else:
            changed = [f"{name} {self.hparams[name]}, was {kept.get(name)}" for name in changed]
        if changed:
            raise UserError(
                f"The run began with another model or optimizer (found {'; '.join(changed)}), and its checkpoint holds "
                "their state. Give the earlier values, or leave them out; to train with others begin a new run."
            )

    @torch.no_grad()
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
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        parts = [torch.empty(0, self.model.config.embed_dim, device=self.device)]
        with _eval_mode(self.model):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not isinstance(batch, Tensor):
                    batch = torch.stack([self._pixels(image) for image in batch])
                parts.append(unit_norm(self.model.encode_image(batch.to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str], batch_size: int = EMBED_AT_ONCE) -> Tensor:
        """Embed captions, with the model in eval mode.

        Args:
            texts: one caption or several; what is over the context length is cut.
            batch_size: captions at a time.

        Returns:
            (N, D) float32, unit norm, on this module's device.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        parts = [torch.empty(0, self.model.config.embed_dim, device=self.device)]
        with _eval_mode(self.model):
            for start in range(0, len(texts), batch_size):
                tokens, _ = self.tokenizer.batch(texts[start : start + batch_size])
                parts.append(unit_norm(self.model.encode_text(tokens.to(self.device))))
        return torch.cat(parts)

    def _pixels(self, image: Picture) -> Tensor:
        picture = upright_rgb(image, "picture") if isinstance(image, Image.Image) else open_rgb(str(image))
        return to_tensor(center_crop(picture, self.model.config.image.size))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode within the block, each submodule's own mode after it."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
