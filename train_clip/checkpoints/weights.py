"""Which model lies where a user says, settled with the user's choices; its tensors, and how they load: strictly.

Positional embeddings for images of another size and captions of another length. Only on request.

L  positions      W  width      G  places of the grid along a side

What weights are, by their content: the same in whatever file, format or precision of file they lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_clip.checkpoints.formats import identify
from train_clip.checkpoints.found import Choices, Found, Tensors
from train_clip.checkpoints.openai import STRIDE, require_layers
from train_clip.checkpoints.sources import find_contents
from train_clip.checkpoints.tensors import read_tensors
from train_clip.errors import UserError
from train_clip.models.blocks import ACTIVATIONS
from train_clip.models.config import ModelConfig, ResNetConfig, ViTConfig, config_from_dict, read_config
from train_clip.prompts.file import join

OF_IMAGES = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
OF_TEXT = "positional_embedding"


def resize_image_positions(tensors: Tensors, side: int) -> Tensors:
    """Interpolate the grid of an image tower's positions, bicubic with antialiasing, as open_clip does (its model.py).

    Args:
        tensors: of a CLIP; the first position, of the class token or the mean, stays.
        side: G of the image size that is asked for.
    """
    return {name: _resize_grid(tensor, side) if name in OF_IMAGES else tensor for name, tensor in tensors.items()}


def resize_text_positions(tensors: Tensors, context: int) -> Tensors:
    """Fewer positions are the first ones; more are interpolated linearly, as open_clip does (its model.py).

    Args:
        tensors: of a CLIP.
        context: L that is asked for.
    """
    return {name: _resize_line(tensor, context) if name == OF_TEXT else tensor for name, tensor in tensors.items()}


def _resize_grid(positions: Tensor, side: int) -> Tensor:
    """Map (1 + G², W) to (1 + side², W)."""
    now = math.isqrt(max(0, len(positions) - 1)) if positions.ndim == 2 else 0
    if now in (0, side) or now**2 + 1 != len(positions):
        return positions  # as they are, or no grid: strict loading says what they are instead
    first, grid = positions[:1], positions[1:]
    square = grid.T.unflatten(1, (now, now))[None]
    resized = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, resized[0].flatten(1).T])


def _resize_line(positions: Tensor, length: int) -> Tensor:
    """Map (L, W) to (length, W)."""
    if positions.ndim != 2 or length <= len(positions):
        return positions[:length] if positions.ndim else positions
    return F.interpolate(positions.T[None], size=length, mode="linear", align_corners=False)[0].T.contiguous()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values.

    Args:
        tensors: on any device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(memoryview(values.contiguous().numpy()).cast("B") if values.numel() else b"")
    return digest.hexdigest()


NAMED = 3  # tensors in a message


@dataclass(frozen=True)
class Weights:
    """A model in a file, all that is needed to build it settled.

    Args:
        source: what messages name.
        found: what the file is.
        choices: the user's.
        config: of a CLIP; None for two encoders, which ``found.arguments`` tell of.
        backbone: of visual prompts in a file of their own.
    """

    source: str
    found: Found
    choices: Choices
    config: ModelConfig | None
    backbone: Weights | None = None

    def read(self) -> dict[str, Tensor]:
        """The tensors by the names that they have here, float32, positions interpolated where that was asked for."""
        tensors = self.read_as_kept()
        if self.backbone is not None:
            kept = self.backbone.read_as_kept()
            self._require_backbone(digest_of(kept), self.backbone.source)
            return join(tensors, self.backbone.resized(kept))
        return self.resized(tensors)

    def read_as_kept(self) -> Tensors:
        """The tensors by the names that they have here, float32, of the sizes that they have in the file."""
        try:
            return self.found.rename(read_tensors(self.found.records))
        except UserError as error:
            # Whatever names a tensor alone.
            raise error if self.source in str(error) else UserError(f"{self.source}: {error}") from error

    def resized(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors as they are kept, with positions interpolated where that was asked for."""
        if self.config is not None and self.choices.image_size is not None:
            tensors = resize_image_positions(tensors, self.choices.image_size // _pixels_of_place(self.config))
        if self.choices.context_length is not None:
            tensors = resize_text_positions(tensors, self.choices.context_length)
        return dict(tensors)

    def _require_backbone(self, found: str, place: str) -> None:
        if found != (expected := self.found.arguments["digest"]):
            raise UserError(
                f"{self.source}: its prompts belong to another backbone: SHA-256 of its weights {expected[:16]}…, of "
                f"{place} {found[:16]}…. Give the one that they were trained beside: --backbone of `train-clip "
                "evaluate` (in Python backbone=…)."
            )


def find_weights(source: str | Path, choices: Choices) -> Weights:
    """Find a model, and settle with the user's choices what its file leaves open.

    Args:
        source: as for ``load``.
        choices: the user's.

    Raises:
        UserError: as ``load``.
    """
    found = identify(find_contents(source))
    if found.prompts is not None:
        _require_no_choice(choices, str(source))
    if found.prompts is not None and found.config is None:
        return _beside_backbone(found, choices, str(source))
    if choices.backbone is not None:
        raise UserError(f"{source}: {found.format}, a whole model. Leave the backbone out.")
    if found.config is None:
        if any(value is not None for value in dataclasses.astuple(choices)):
            raise UserError(
                f"{source}: two encoders, whose sizes and activations are their own. Leave the choices out."
            )
        return Weights(str(source), found, choices, None)
    require_layers(found.config, found.records, str(source))
    config = _sized(_settled(found, found.config, choices, source), choices, source)
    return Weights(str(source), found, choices, config)


def find_model(source: str | Path, model: ModelConfig) -> Weights:
    """Find weights that are known to be of a model: what their file leaves open, the model says.

    Args:
        source: as for ``load``.
        model: positions are interpolated to its sizes.

    Raises:
        UserError: as ``load``, or they are of another model.
    """
    found = identify(find_contents(source))
    require_no_prompts(found, str(source))
    config = found.config
    if config is None:
        raise UserError(f"{source}: two encoders; expected {model.name}, a CLIP.")
    require_layers(config, found.records, str(source))
    choices = Choices(
        image_size=None if config.image.size == model.image.size else model.image.size,
        context_length=None if config.text.context == model.text.context else model.text.context,
    )
    said = _sized(config, choices, source)
    if "heads" in found.unsaid and isinstance(said.image, ViTConfig) and isinstance(model.image, ViTConfig):
        said = dataclasses.replace(
            said,
            image=dataclasses.replace(said.image, heads=model.image.heads),
            text=dataclasses.replace(said.text, heads=model.text.heads),
        )
    if "activation" in found.unsaid:
        said = dataclasses.replace(said, activation=model.activation, mean=model.mean, std=model.std)
    for name in ("embed_dim", "image", "text", "activation", "mean", "std"):
        if getattr(said, name) != getattr(model, name):
            raise UserError(
                f"{source}: another model: its {name} is {getattr(said, name)}, expected {getattr(model, name)}."
            )
    return Weights(str(source), found, choices, dataclasses.replace(model, logit_bias=config.logit_bias))


def require_no_prompts(found: Found, source: str) -> None:
    """Refuse what is a CLIP with visual prompts, where one without is needed.

    Raises:
        UserError: it is.
    """
    if found.prompts is not None:
        raise UserError(
            f"{source}: {found.format}; expected a CLIP without prompts. Give the backbone that they were trained "
            "beside. To train the prompts on: train-clip prompt-tune --resume."
        )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights strictly.

    Raises:
        UserError: tensors that are missing, too many, or of other shapes; both are named.
    """
    own = model.state_dict()
    missing, foreign = [
        sorted(one - other) for one, other in ((own.keys(), tensors.keys()), (tensors.keys(), own.keys()))
    ]
    shared = [name for name in own if name in tensors]
    shapes = [name for name in shared if own[name].shape != tensors[name].shape]
    kinds = [name for name in shared if own[name].is_floating_point() != tensors[name].is_floating_point()]
    found = [f"lacks {_some(missing)}"] if missing else []
    found += [f"has {_some(foreign)} besides"] if foreign else []
    found += [
        f"has {name} of shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}" for name in shapes[:NAMED]
    ]
    found += [f"has {name} of {tensors[name].dtype}, not {own[name].dtype}" for name in kinds[:NAMED]]
    if found:
        raise UserError(
            f"{source}: does not fit its model: it {'; it '.join(found)}. Expected exactly the model's tensors. If the "
            "sizes are another's, name it (--model_name)."
        )
    model.load_state_dict(tensors, assign=any(parameter.is_meta for parameter in model.parameters()))


def _beside_backbone(found: Found, choices: Choices, source: str) -> Weights:
    """Visual prompts, and the backbone where the user says that it lies, or where it lay when they were trained."""
    model = config_from_dict(dict(found.arguments["config"]), source)
    try:
        backbone = find_model(choices.backbone or found.arguments["backbone"], model)
    except UserError as error:
        raise UserError(
            f"{source}: visual prompts, whose backbone cannot be loaded ({error}) If it lies elsewhere by now: "
            "--backbone of `train-clip evaluate` (in Python backbone=…)."
        ) from error
    return Weights(source, found, choices, model, backbone)


def _require_no_choice(choices: Choices, source: str) -> None:
    if any(value is not None for value in dataclasses.astuple(dataclasses.replace(choices, backbone=None))):
        raise UserError(f"{source}: visual prompts, whose backbone is of one size. Leave the other choices out.")


def _settled(found: Found, config: ModelConfig, choices: Choices, source: str | Path) -> ModelConfig:
    """The configuration with what the file leaves open as the user has chosen."""
    if choices.model_name is not None:
        config = _named(read_config(choices.model_name), found, config, choices, source)
    elif "heads" in found.unsaid:
        raise UserError(
            f"{source}: weights of no model that is known by its sizes, and how many attention heads it has, no tensor "
            "tells. Describe it in a YAML file and give that as --model_name (in Python model_name=…). "
            "`train-clip models --show ViT-B/32` prints one to start from."
        )
    if "activation" not in found.unsaid:
        if config.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{source}: its activation is {config.activation}; known: {known}.")
        if choices.activation not in (None, config.activation):
            raise UserError(
                f"{source}: its activation is {config.activation}, found {choices.activation} asked for. Leave "
                "--activation out."
            )
        return config
    if choices.activation not in ACTIVATIONS:
        raise UserError(
            f"{source}: does not say which activation it was trained with, and no tensor tells. OpenAI's weights, and "
            "what was trained from them, have quick_gelu; open_clip's other models have gelu, but for those whose name "
            "ends in -quickgelu. Choose: --activation quick_gelu or --activation gelu (in Python activation=…)."
        )
    return dataclasses.replace(config, activation=choices.activation)


def _named(named: ModelConfig, found: Found, config: ModelConfig, choices: Choices, source: str | Path) -> ModelConfig:
    """The model that the user names, where the file leaves its sizes open; the file's own, which it has to equal."""
    if "heads" in found.unsaid:
        return dataclasses.replace(named, activation=config.activation, logit_bias=config.logit_bias)
    # A run's copy of its model has the sizes that were asked for then.
    asked, has = (_sized(one, choices, source) for one in (named, config))
    if (asked.embed_dim, asked.image, asked.text) != (has.embed_dim, has.image, has.text):
        raise UserError(
            f"{source}: holds {config.name}, and --model_name {choices.model_name} is of other sizes. Leave "
            "--model_name out."
        )
    says_all = "activation" not in found.unsaid
    return config if says_all else dataclasses.replace(config, mean=named.mean, std=named.std)


def _sized(config: ModelConfig, choices: Choices, source: str | Path) -> ModelConfig:
    """The configuration for another size of images or length of captions."""
    try:
        if choices.image_size is not None:
            config = config.with_image_size(choices.image_size)
        return config if choices.context_length is None else config.with_context(choices.context_length)
    except UserError as error:
        raise UserError(f"{source}: {error}.") from error


def _pixels_of_place(config: ModelConfig) -> int:
    """Pixels to a place of the grid that positions are embedded in."""
    return STRIDE if isinstance(config.image, ResNetConfig) else config.image.patch


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
