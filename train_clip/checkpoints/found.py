"""The formats of weights, each of which can be completed, described, read and built; ``load``.

L  positions      W  width      G  patches along a side
"""

import hashlib
import math
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from typing_extensions import override

from train_clip.checkpoints import read, sources
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, read_config
from train_clip.options import WeightOptions

if TYPE_CHECKING:  # `train-clip inspect` answers before PyTorch would be there
    from train_clip.data.crops import Preprocess
    from train_clip.models.clip import CLIP, DualEncoder

Tensors = dict[str, Any]

# Every format that is read: a function of ``Contents`` that returns a ``Found``, or None for another format. The first
# that knows a file says what it is: files that say it themselves before those that are told by their tensors.
FORMATS = (
    "train_clip.prompts.file:find_prompts",
    "train_clip.encoders.sources:find_encoders",
    "train_clip.checkpoints.own:find_checkpoint",
    "train_clip.checkpoints.own:find_safetensors",
    "train_clip.prompts.file:find_fork",
    "train_clip.checkpoints.own:find_train_clip",
    "train_clip.checkpoints.huggingface:find_huggingface",
    "train_clip.checkpoints.open_clip:find_open_clip",
    "train_clip.checkpoints.openai:find_openai",
)
WRAPPINGS = ("module.", "_orig_mod.") * 4  # before each name, of models that were wrapped or compiled when saved
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's, which are no parameters
TENSORS_OF_LAYER = 12  # of a transformer's block; a ResNet's has more
NAMED, NONE = 3, "not there"  # tensors in a message
NO_CHOICE = WeightOptions()
OF_IMAGES = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
OF_TEXT = "positional_embedding"


class Pretrained(NamedTuple):
    """What ``load`` gives."""

    model: "DualEncoder"  # in eval mode, in float32: ``encode_image``, ``encode_text``, ``logit_scale``
    preprocess: "Preprocess"  # a picture or its path → (3, S, S) float32, as the model takes it
    tokenizer: Any  # a caption or several → what ``encode_text`` takes


def load(source: str | Path, *, backbone: str | Path | None = None, **choices: Any) -> Pretrained:
    """Load a CLIP, or two encoders joined by this package, from any supported format; no code of a file is run.

    Args:
        source: a file by OpenAI, open_clip, Hugging Face, train-CLIP or this package; a folder with ``config.json`` or
            ``open_clip_config.json``; a name of OpenAI's (``ViT-B/32``); or ``hf-hub:NAME``.
        backbone: for a file of visual prompts, its backbone, if it has moved.
        choices: ``model_name``, ``activation``, ``image_size``, ``context_length``; mostly none is needed.

    Raises:
        UserError: a missing, unknown, damaged or hostile file, or an option that has to be set.
    """
    return find_weights(source, WeightOptions(**choices), backbone).build()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model in a file."""

    format: str  # as `train-clip inspect` prints it
    source: str  # what messages name
    records: Mapping[str, read.TensorRecord]  # its tensors, prefixes taken off
    rename: Callable[[Tensors], Tensors] = dict  # maps them, read, to the names and shapes that the model has here
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what the module that was trained was made with
    about: Mapping[str, Any] = field(default_factory=dict)  # what else the file says, for who reads it

    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Self:
        """Complete with the user's options what the file does not say; a missing or unused option is an error."""
        if backbone is not None:
            self.refuse(f"{self.format}, a whole model. Leave out the backbone")
        if choices != NO_CHOICE:
            self.refuse(f"{self.format}, whose sizes and activations are fixed. Leave out these options")
        return self

    def read_as_kept(self) -> Tensors:
        """Read the tensors under this package's names, in float32, with the sizes in the file."""
        return self.rename(read.read_tensors(self.records))

    def read(self) -> Tensors:
        """Read the tensors with the requested sizes."""
        return self.read_as_kept()

    def empty(self) -> tuple["DualEncoder", Any]:
        """Build the model, its weights still to be filled in, and its tokenizer."""
        raise NotImplementedError

    def build(self) -> Pretrained:
        """Build the model, filled strictly, in eval mode, with its preprocessing and its tokenizer."""
        from train_clip.data.crops import Preprocess

        model, tokenizer = self.empty()
        fill(model, self.read(), self.source)
        preprocess = Preprocess(model.image_size, model.pixel_norm.mean, model.pixel_norm.std)
        return Pretrained(model.eval(), preprocess, tokenizer)

    def describe(self) -> dict[str, str]:
        """The model in words, by heading."""
        kinds = sorted({record.dtype for record in self.records.values()})
        numbers = sum(math.prod(record.shape) for name, record in self.records.items() if not name.endswith(BUFFERS))
        return {"weights": f"{numbers:,} parameters in {len(self.records):,} tensors, {', '.join(kinds)}"}

    def require_clip(self, instead: str = "; expected a CLIP.") -> "FoundCLIP":
        """Give this, a plain CLIP; ``instead`` ends the refusal of two encoders."""
        raise UserError(f"{self.source}: two encoders{instead}")

    def refuse(self, why: str) -> NoReturn:
        """Raise a ``UserError`` that starts with the source."""
        raise UserError(f"{self.source}: {why}.")


@dataclass(frozen=True, kw_only=True)
class FoundCLIP(Found):
    """A CLIP in a file."""

    config: ModelConfig
    says_activation: bool = True  # or the configuration has any
    says_heads: bool = True
    choices: WeightOptions = NO_CHOICE

    @override
    def require_clip(self, instead: str = "") -> Self:
        return self

    @override
    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Self:
        super().settled(NO_CHOICE, backbone)
        config = self.config
        if choices.model_name is not None:
            named = read_config(choices.model_name)
            config = self._told_by(named)
            # A run's copy of its model has the sizes that were asked for then.
            if self._sized(named, choices).sizes != self._sized(config, choices).sizes:
                self.refuse(
                    f"holds {config.name}, and --model_name {choices.model_name} has other sizes. Leave out "
                    "--model_name"
                )
        elif not self.says_heads:
            self.refuse(
                "weights of a model with unknown sizes, and tensors do not show the number of attention heads. "
                "Describe the model in a YAML file and pass it as --model_name (in Python model_name=…). "
                "`train-clip models --show ViT-B/32` prints one to start from"
            )
        config = self._sized(self._activated(config, choices), choices)
        return replace(self, config=config, choices=choices)

    def matched(self, model: ModelConfig) -> Self:
        """Settle by a model that they are known to be of: it says what the file leaves open, and the sizes."""
        choices = WeightOptions(image_size=model.image.size, context_length=model.text.context)
        said = self._sized(self._told_by(model), choices)
        for name in ("embed_dim", "image", "text", "activation", "mean", "std"):
            if (found := getattr(said, name)) != (expected := getattr(model, name)):
                self.refuse(f"another model: its {name} is {found}, expected {expected}")
        return replace(self, config=replace(model, logit_bias=self.config.logit_bias), choices=choices)

    @override
    def read(self) -> Tensors:
        return self.resized(self.read_as_kept())

    def resized(self, tensors: Tensors) -> Tensors:
        """Interpolate positions of tensors as they are kept, where that was asked for."""
        if self.choices.image_size is not None:
            tensors = resize_image_positions(tensors, self.choices.image_size // self.config.image.pixels_per_place)
        if self.choices.context_length is not None:
            tensors = resize_text_positions(tensors, self.choices.context_length)
        return tensors

    @override
    def empty(self) -> tuple["CLIP", Any]:
        import torch

        from train_clip.data.tokenizer import Tokenizer
        from train_clip.models.clip import CLIP, PixelNorm

        if self.config.text.vocab < Tokenizer.vocab_size:
            warnings.warn(
                f"{self.source}: its vocabulary of {self.config.text.vocab:,} tokens is not CLIP's. The tokenizer "
                "returned here is CLIP's, and does not match the model.",
                stacklevel=5,
            )
        # Without memory for weights that are replaced at once, and the seconds that it takes to draw them.
        try:
            with torch.device("meta"):
                model = CLIP(self.config)
        except UserError as error:  # such as an activation that is not known here
            self.refuse(str(error).removesuffix("."))
        model.pixel_norm = PixelNorm(self.config.mean, self.config.std)
        return model, Tokenizer(self.config.text.context)

    @override
    def describe(self) -> dict[str, str]:
        config, text = self.config, self.config.text
        activation = config.activation if self.says_activation else "not stated in the file"
        return {
            "model": config.name,
            "image tower": f"{config.image}, {config.image.size}×{config.image.size} pixels",
            "text tower": f"{text.layers} layers of {text.width}, {text.heads} heads, {text.context} tokens of "
            f"{text.vocab:,}",
            "embedding": f"{config.embed_dim} numbers",
            "activation": activation + "; the file does not state the number of heads" * (not self.says_heads),
            **({"logits": "with the bias of the sigmoid loss"} if config.logit_bias else {}),
            **super().describe(),
        }

    def _told_by(self, named: ModelConfig) -> ModelConfig:
        # What the file leaves open as a model says it that the file is to be of.
        told = self.config
        if not self.says_heads:
            told = replace(named, activation=told.activation, logit_bias=told.logit_bias)
        if not self.says_activation:
            told = replace(told, activation=named.activation, mean=named.mean, std=named.std)
        return told

    def _activated(self, config: ModelConfig, choices: WeightOptions) -> ModelConfig:
        chosen = choices.activation
        said = config.activation if self.says_activation else chosen
        if said is None:
            self.refuse(
                "does not state which activation it was trained with, and tensors do not show it. OpenAI's weights, "
                "and models trained from them, have quick_gelu; open_clip's other models have gelu, except those "
                "whose name ends in -quickgelu. Choose: --activation quick_gelu or --activation gelu (in Python "
                "activation=…)"
            )
        if chosen not in (None, said):
            self.refuse(f"its activation is {said}, found {chosen} requested. Leave out --activation")
        return replace(config, activation=said)

    def _sized(self, config: ModelConfig, choices: WeightOptions) -> ModelConfig:
        # Before a model is built of it: more layers than there are tensors for.
        if ((layers := self.config.text.layers + self.config.image.layers) - 1) * TENSORS_OF_LAYER > len(self.records):
            self.refuse(f"{layers:,} layers, and {len(self.records):,} tensors, which are too few for that")
        try:
            return config.with_sizes(choices.image_size, choices.context_length)
        except UserError as error:
            self.refuse(str(error))


def find_weights(source: str | Path, choices: WeightOptions = NO_CHOICE, backbone: str | Path | None = None) -> Found:
    """Find a model, and settle with the user's choices what its file leaves open; arguments and errors as ``load``."""
    return identify(sources.find_contents(source)).settled(WeightOptions.pick(vars(choices)), backbone)


def find_model(source: str | Path, model: ModelConfig) -> FoundCLIP:
    """Find weights that are known to be of a model: what their file leaves open, the model says; others are refused."""
    return identify(sources.find_contents(source)).require_clip(f"; expected {model.name}, a CLIP.").matched(model)


def identify(contents: read.Contents) -> Found:
    """Say which model a file holds."""
    tensors = contents.tensors
    for prefix in WRAPPINGS:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): record for key, record in tensors.items()}
    contents = replace(contents, tensors=tensors)
    for name in FORMATS:
        if (found := pkgutil.resolve_name(name)(contents)) is not None:
            return found
    raise UserError(
        f"{contents.path}: {len(tensors):,} tensors ({', '.join(list(tensors)[:5])}, …) that are not those of a CLIP. "
        "Expected one by OpenAI, open_clip, Hugging Face or this package. To start from other encoders: train-clip "
        "finetune --image_encoder … --text_encoder …"
    )


def require_usual(values: Mapping[str, Any], usual: Mapping[str, tuple[Any, ...]], source: str, message: str) -> None:
    """Refuse settings that are none of the usual values, the first of which stands for one that is missing."""
    for name, known in usual.items():
        if (value := values.get(name, known[0])) not in known:
            raise UserError(f"{source}: {message.format(name=name, value=value, known=known[-1])}")


def fill(model: Any, tensors: Mapping[str, Any], source: str) -> None:
    """Load weights strictly: tensors that are missing, too many, or of other shapes are refused by their names."""
    found, expected = _forms(tensors), _forms(model.state_dict())
    if odd := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        some = [f"{name} is {found.get(name, NONE)}, expected {expected.get(name, NONE)}" for name in odd[:NAMED]]
        raise UserError(
            f"{source}: does not match its model in {len(odd):,} tensors: {'; '.join(some)}. Expected the tensors of "
            "the model. If these are the sizes of another model, name it (--model_name)."
        )
    require_finite(tensors, source)
    model.load_state_dict(tensors, assign=any(parameter.is_meta for parameter in model.parameters()))


def require_finite(tensors: Mapping[str, Any], source: str) -> None:
    """Refuse weights with NaN or infinity in them, of which no embedding and no training means anything."""
    if bad := [name for name, one in tensors.items() if one.is_floating_point() and not one.isfinite().all()]:
        raise UserError(
            f"{source}: {len(bad):,} of its {len(tensors):,} tensors hold NaN or infinity, such as "
            f"{', '.join(bad[:NAMED])}. Expected finite numbers: the run that wrote them diverged, or the file is "
            "damaged. Use an earlier checkpoint, or other weights."
        )


def _forms(tensors: Mapping[str, Any]) -> dict[str, str]:
    kinds = {True: "numbers", False: "whole numbers"}
    return {name: f"{tuple(one.shape)} {kinds[one.is_floating_point()]}" for name, one in tensors.items()}


def resize_image_positions(tensors: Tensors, side: int) -> Tensors:
    """Interpolate the grid of an image tower's positions, bicubic with antialiasing, as open_clip does (its model.py).

    The first position, of the class token or the mean, stays: (1 + G², W) → (1 + side², W).
    """
    import torch

    resized = dict(tensors)
    for name in tensors.keys() & OF_IMAGES:
        positions = tensors[name]
        now = math.isqrt(len(positions)) if positions.ndim == 2 else 0
        # As they are, or no grid: strict loading says what they are instead.
        if now not in (0, side) and now**2 + 1 == len(positions):
            square = positions[1:].T.unflatten(1, (now, now))[None]
            grid = torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True)
            resized[name] = torch.cat([positions[:1], grid[0].flatten(1).T])
    return resized


def resize_text_positions(tensors: Tensors, context: int) -> Tensors:
    """Fewer positions, (L, W) → (context, W), are the first ones; more are interpolated linearly, as open_clip does."""
    import torch

    positions = tensors.get(OF_TEXT)
    if positions is None or positions.ndim != 2:
        return tensors
    resized = positions[:context]
    if context > len(positions):
        resized = torch.nn.functional.interpolate(positions.T[None], context, mode="linear")[0].T.contiguous()
    return tensors | {OF_TEXT: resized}


def digest_of(tensors: Tensors) -> str:
    """SHA-256 over names, shapes and float32 values: the same in whatever format or precision of file they lie."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.contiguous().numpy())
    return digest.hexdigest()
