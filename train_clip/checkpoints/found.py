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
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from typing_extensions import override

from train_clip.checkpoints import read, sources, state_dicts
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, read_config
from train_clip.options import WeightOptions
from train_clip.printing import printable

if TYPE_CHECKING:  # `train-clip inspect` answers before PyTorch would be there
    from train_clip.checkpoints.load import Pretrained
    from train_clip.models.clip import CLIP, DualEncoder

Tensors = dict[str, Any]

# Every format that is read: a function of ``Contents`` that returns a ``Found``, or None for another format. The first
# that knows a file says what it is: files that say it themselves before those that are told by their tensors. Those of
# a CLIP get its tensors alone, without what the file has around them.
OTHERS = (
    "train_clip.prompts.file:find_prompts",
    "train_clip.lora.file:find_lora",
    "train_clip.encoders.sources:find_encoders",
    "train_clip.adapters.find:find_adapted",
)
CLIPS = (
    "train_clip.checkpoints.own:find_checkpoint",
    "train_clip.checkpoints.own:find_safetensors",
    "train_clip.prompts.file:find_fork",
    "train_clip.checkpoints.own:find_train_clip",
    "train_clip.checkpoints.huggingface:find_huggingface",
    "train_clip.checkpoints.open_clip:find_open_clip",
    "train_clip.checkpoints.openai:find_openai",
)
TAKEN = "taken from"  # in ``Found.about``, where a file holds more than this CLIP
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's, which are no parameters
TENSORS_OF_LAYER = 12  # of a transformer's block; a ResNet's has more
NAMED, NONE = 3, "not there"  # tensors in a message
NO_CHOICE = WeightOptions()
OF_IMAGES = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
OF_TEXT = "positional_embedding"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model in a file."""

    format: str  # as `train-clip inspect` prints it
    source: str  # what messages name
    records: Mapping[str, read.TensorRecord]  # its tensors, prefixes taken off
    rename: Callable[[Tensors], Tensors] = dict  # maps them, read, to the names and shapes that the model has here
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what the module that was trained was made with
    about: Mapping[str, Any] = field(default_factory=dict)  # what else the file says, for who reads it
    writer: ClassVar[str] = ""  # of the one format, Hugging Face's, that can hold it; empty for a CLIP's formats

    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Self:
        """Complete with the user's options what the file does not say; a missing or unused option is an error."""
        if backbone is not None:
            self.refuse(f"{self.format}, a whole model. Leave out the backbone")
        if choices != NO_CHOICE:
            self.refuse(f"{self.format}, whose sizes and activations are fixed. Leave out these options")
        return self

    def read_as_kept(self) -> Tensors:
        """Read the tensors under this package's names, in float32, with the sizes in the file."""
        return self.as_kept(read.read_tensors(self.records))

    def as_kept(self, tensors: Tensors) -> Tensors:
        """Map the file's tensors to this package's names and shapes."""
        tensors = self.rename(tensors)
        # The temperature of some of open_clip's models has one dimension, of size 1, and so has their bias.
        scalars = {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
        return tensors | {name: one.reshape(()) for name, one in scalars.items() if one.numel() == 1}

    def read(self) -> Tensors:
        """Read the tensors with the requested sizes."""
        return self.resized(self.read_as_kept())

    def resized(self, tensors: Tensors) -> Tensors:
        """Tensors as they are kept → with the requested sizes."""
        return tensors

    def empty(self) -> tuple["DualEncoder", Any]:
        """Build the model, its weights still to be filled in, and its tokenizer."""
        raise NotImplementedError

    def build(self) -> "Pretrained":
        """Build the model, filled strictly, in eval mode, with its preprocessing and its tokenizer."""
        from train_clip.checkpoints.load import Pretrained
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
    def resized(self, tensors: Tensors) -> Tensors:
        # Positions are interpolated, where that was asked for.
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
    return _find(source).settled(WeightOptions.pick(vars(choices)), backbone)


def find_model(source: str | Path, model: ModelConfig) -> FoundCLIP:
    """Find weights that are known to be of a model: what their file leaves open, the model says; others are refused."""
    return _find(source).require_clip(f"; expected {model.name}, a CLIP.").matched(model)


def _find(source: str | Path) -> Found:
    found = identify(sources.find_contents(source))
    if str(source).startswith(sources.HUB):  # which a name needs, to be found again
        found = replace(found, source=str(source))
    if TAKEN in found.about:
        warnings.warn(
            f"{found.source}: its CLIP is taken from {found.about[TAKEN]}. To use another one, save its state dict in "
            "a file of its own.",
            stacklevel=4,
        )
    return found


def identify(contents: read.Contents) -> Found:
    """Say which model a file holds."""
    contents = state_dicts.unwrapped(contents)
    clip = state_dicts.clip_in(contents)
    for formats, seen in (OTHERS, contents), (CLIPS, clip):
        for name in formats:
            if (found := pkgutil.resolve_name(name)(seen)) is None:
                continue
            if found.arguments or not seen.left_out:  # what this package's own runs leave beside a model is known
                return found
            left_out = [name[: read.MOST_SHOWN] for name in seen.left_out[: 2 * NAMED]]
            left_out += ["…"] * (len(seen.left_out) > len(left_out))
            taken = printable(f"{seen.place or 'its top level'}; left out: {', '.join(left_out)}")
            return replace(found, about={TAKEN: taken, **found.about})
    tensors, first = clip.tensors, printable(", ".join(list(clip.tensors)[:5]))
    raise UserError(
        f"{contents.path}: {len(tensors):,} tensors ({first}, …) that are not those of a CLIP. Expected one by "
        "OpenAI, open_clip, Hugging Face or this package. To start from other encoders: train-clip finetune "
        "--image_encoder … --text_encoder …"
    )


def require_usual(values: Mapping[str, Any], usual: Mapping[str, tuple[Any, ...]], source: str, message: str) -> None:
    """Refuse settings that are none of the usual values, the first of which stands for one that is missing."""
    for name, known in usual.items():
        if (value := values.get(name, known[0])) not in known:
            raise UserError(f"{source}: {message.format(name=name, value=value, known=known[-1])}")


def side(size: Any) -> Any:
    """The side of a square that is given as height and width, equal ones; any other size as it is."""
    return size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size


def fill(model: Any, tensors: Mapping[str, Any], source: str) -> None:
    """Load weights strictly: tensors that are missing, too many, or of other shapes are refused by their names."""
    tensors = require_forms(model, tensors, source)
    require_finite(tensors, source)
    model.load_state_dict(tensors, assign=any(parameter.is_meta for parameter in model.parameters()))


def require_forms(model: Any, tensors: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Refuse tensors that are missing, too many, or of other shapes; give them under the model's own names."""
    tensors = state_dicts.renamed(tensors, model.state_dict())
    found, expected = _forms(tensors), _forms(model.state_dict())
    if odd := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        some = [f"{name} is {found.get(name, NONE)}, expected {expected.get(name, NONE)}" for name in odd[:NAMED]]
        raise UserError(
            f"{source}: does not match its model in {len(odd):,} tensors: {'; '.join(some)}. Expected the tensors of "
            "the model. If these are the sizes of another model, name it (--model_name)."
        )
    return tensors


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


def fingerprint(model: "DualEncoder") -> str:
    """Digest of what embeds in a model: equal whatever file it came from, and at any temperature."""
    idle = ("logit_scale", "logit_bias", "num_batches_tracked")
    tensors = {name: one for name, one in model.state_dict().items() if name.rpartition(".")[2] not in idle}
    for other in model.names_of_layers[1:]:
        tensors = {name.replace(other, model.names_of_layers[0]): one for name, one in tensors.items()}
    norm = {"pixel_norm.mean": model.pixel_norm.mean, "pixel_norm.std": model.pixel_norm.std}
    told = f"{model.image_size} pixels, {model.embeds_by}"  # as a name, which is digested
    return digest_of(tensors | norm | {told: model.pixel_norm.mean[:0]})
