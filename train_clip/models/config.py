"""What a CLIP is made of, and the numbers it is trained with: YAML read into frozen dataclasses.

A preset (``ViT-B/32``) and a user's own file have the same form. Sizes are the paper's (arXiv 2103.00020, tables 19
and 20), optimizer numbers its tables 18 to 20.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from train_clip.errors import UserError

LONGEST_SHOWN = 60  # letters of a value in a message

# Per-channel mean and deviation of CLIP's training images, in [0, 1] (openai/CLIP, clip.py, _transform).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# What the sigmoid loss begins with: few of a batch's pairs belong together, and without the bias the first steps would
# only bring the others down (SigLIP, arXiv 2303.15343, section 3.2).
START_OF_SIGMOID = {"logit_scale": math.log(10), "logit_bias": -10.0}


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer.

    Args:
        size: side of the square input, in pixels.
        patch: side of a patch, in pixels.
        layers: number of blocks.
        width: embedding width within the blocks.
        heads: attention heads; divides the width.
    """

    tower: ClassVar[str] = "train_clip.models.vit:VisionTransformer"

    size: int
    patch: int
    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.size % self.patch == 0, f"image size {self.size} is not a multiple of the patch {self.patch}")
        _require(self.width % self.heads == 0, f"image width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class ResNetConfig:
    """CLIP's modified ResNet.

    Args:
        size: side of the square input, in pixels; a multiple of 32, the total stride.
        blocks: number of bottlenecks in each of the four stages.
        width: channels of the stem (table 19 prints 32 times this).
    """

    tower: ClassVar[str] = "train_clip.models.resnet:ModifiedResNet"

    size: int
    blocks: tuple[int, int, int, int]
    width: int

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.size % 32 == 0, f"image size {self.size} is not a multiple of 32, a ResNet's stride")
        _require(self.width % 2 == 0, f"image width {self.width} is odd; the pooling has width / 2 heads")


@dataclass(frozen=True)
class TextConfig:
    """The text transformer.

    Args:
        context: tokens of a caption at most, start and end included.
        vocab: number of tokens in the vocabulary.
        layers: number of blocks.
        width: embedding width within the blocks.
        heads: attention heads; divides the width.
    """

    context: int
    vocab: int
    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.context >= 2, f"context {self.context}, expected 2 or above, for start and end")
        _require(self.width % self.heads == 0, f"text width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class OptimizerConfig:
    """The numbers of AdamW and the length of the run.

    Args:
        lr: peak learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on matrices and convolutions only.
        warmup_steps: optimizer steps until the peak.
        epochs: passes over the pairs.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    epochs: int

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"learning rate {self.lr}, expected above 0")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas {self.betas}, expected from 0 to below 1")
        _require(self.eps > 0, f"eps {self.eps}, expected above 0")
        _require(self.weight_decay >= 0, f"weight decay {self.weight_decay}, expected 0 or above")
        _require(self.warmup_steps >= 0, f"warmup_steps {self.warmup_steps}, expected 0 or above")
        _require(self.epochs > 0, f"epochs {self.epochs}, expected above 0")


@dataclass(frozen=True)
class ModelConfig:
    """One CLIP: two towers, the width where they meet, and the numbers it is trained with.

    Args:
        name: how it is called in messages and files.
        embed_dim: width of the space where images and captions meet.
        image: the image tower's sizes.
        text: the text tower's sizes.
        optimizer: defaults for training it.
        activation: ``quick_gelu`` (OpenAI's models) or ``gelu``.
        mean: of each channel: the image tower takes (x / 255 - mean) / std.
        std: of each channel.
        logit_bias: whether its logits have a bias, as the sigmoid loss learns one; the loss that it is trained with
            decides.
    """

    name: str
    embed_dim: int
    image: ViTConfig | ResNetConfig
    text: TextConfig
    optimizer: OptimizerConfig
    activation: str = "quick_gelu"
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    logit_bias: bool = False

    def __post_init__(self) -> None:
        _require(self.embed_dim > 0, f"embed_dim {self.embed_dim}, expected above 0")
        _require(all(map(math.isfinite, self.mean)), f"mean {self.mean}, expected finite numbers")
        _require(all(0 < value < math.inf for value in self.std), f"std {self.std}, expected finite, above 0")

    def with_image_size(self, size: int) -> ModelConfig:
        """The same model for another input size, in pixels."""
        return dataclasses.replace(self, image=dataclasses.replace(self.image, size=size))

    def with_context(self, context: int) -> ModelConfig:
        """The same model for captions of another length, in tokens."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, context=context))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as a preset file holds them; ``config_from_dict`` reads them back."""
        values = _plain(dataclasses.asdict(self))
        # Left out where there is none: so are the files and runs of before there could be one.
        return values if self.logit_bias else {name: value for name, value in values.items() if name != "logit_bias"}


def read_config(name: str) -> ModelConfig:
    """Look up a preset by its name, or read a YAML file of one's own.

    Args:
        name: ``ViT-B/32`` (``ViT-B-32`` serves too), or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        UserError: no such preset or file, or a file that does not hold a model.
    """
    path = Path(name)
    if path.suffix.casefold() in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file. --model_name takes a preset or a YAML file.")
        return _read_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path), default_name=path.stem)
    by_name = {config.name.replace("/", "-"): config for config in presets()}
    if (key := name.replace("/", "-")) not in by_name:
        known = ", ".join(config.name for config in presets())
        raise UserError(f"Unknown model {name!r}. Presets: {known}. For a model of your own give a YAML file.")
    return by_name[key]


@cache
def presets() -> tuple[ModelConfig, ...]:
    """Every model that ships with the package, in the order of their numbered files."""
    folder = resources.files("train_clip.models") / "presets"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return tuple(_read_yaml(file.read_text(encoding="utf-8"), file.name, default_name=file.name) for file in files)


def config_from_dict(values: dict[str, Any], source: str = "config") -> ModelConfig:
    """Build a configuration from plain values, in a preset's form or in the flat form of OpenAI's constructor.

    Args:
        values: the keys of a preset file; or ``embed_dim``, ``image_resolution``, ``vision_layers``, ``vision_width``,
            ``vision_patch_size``, ``context_length``, ``vocab_size``, ``transformer_width``, ``…_heads``, ``…_layers``,
            as train-CLIP's configuration files have them.
        source: named in errors.

    Raises:
        UserError: a key that is unknown or missing, or sizes that do not fit.
    """
    try:
        values = {"name": source} | (_from_flat(values) if "image_resolution" in values else values)
        image = _mapping(values.get("image", {}), "image")
        image_type = ResNetConfig if "blocks" in image else ViTConfig
        if "optimizer" not in values:
            # A model without numbers of its own trains with those of its kind.
            alike = read_config("RN50" if image_type is ResNetConfig else "ViT-B/32")
            values = values | {"optimizer": alike.to_dict()["optimizer"]}
        parts = {
            "image": _build(image_type, image, "image"),
            "text": _build(TextConfig, _mapping(values.get("text", {}), "text"), "text"),
            "optimizer": _build(OptimizerConfig, _mapping(values["optimizer"], "optimizer"), "optimizer"),
        }
        return _build(ModelConfig, values | parts, "model")
    except UserError as error:
        raise UserError(f"{source}: {error}. `train-clip models --show ViT-B/32` prints a complete file.") from None


T = TypeVar("T")


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"unknown key {unknown[0]!r} under {where!r}; known: {', '.join(fields)}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{', '.join(missing)} missing under {where!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _typed(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value of the type that its field declares; whole numbers serve as floats, lists as tuples."""
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UserError(f"{where} is {_shown(value)}, expected a list of {len(kinds)} numbers")
        return tuple(_typed(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        # YAML 1.1 takes 5e-4 for a word: it wants the point.
        hint_name = {"float": "a number such as 5.0e-4", "int": "a whole number", "bool": "true or false"}.get(
            getattr(hint, "__name__", ""), "text"
        )
        raise UserError(f"{where} is {_shown(value)}, expected {hint_name}")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_shown(value)}, expected keys and values")
    return value


def _shown(value: Any) -> str:
    """A value as it is written, or what it is: one out of a file can be too large to print."""
    is_short = isinstance(value, bool | int | float | str | None) and len(str(value)) <= LONGEST_SHOWN
    return repr(value) if is_short else f"a {type(value).__name__}"


def _from_flat(values: dict[str, Any]) -> dict[str, Any]:
    """Preset form of train-CLIP's flat form, whose keys are those of OpenAI's constructor."""
    known = {"name", "embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size"}
    known |= {"context_length", "vocab_size", "transformer_width", "transformer_heads", "transformer_layers"}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown key {unknown[0]!r} beside image_resolution; known: {', '.join(sorted(known))}")
    required = known - {"name", "vision_patch_size"}
    if isinstance(values.get("vision_layers"), int):
        required.add("vision_patch_size")
    if missing := sorted(required - set(values)):
        raise UserError(f"{', '.join(missing)} missing beside image_resolution")
    width, layers = values["vision_width"], values["vision_layers"]
    image: dict[str, Any] = {"size": values["image_resolution"], "width": width}
    if isinstance(layers, int):
        # 64 channels a head, as OpenAI's constructor sets it.
        image |= {"patch": values["vision_patch_size"], "layers": layers, "heads": max(1, width // 64)}
    else:
        image |= {"blocks": layers}
        if width > 128:
            warnings.warn(
                f"A ResNet of width {width}: the paper's have 64 (RN50) to 128 (RN50x64), and train-CLIP's files four "
                "times as much. Divide it by 4 for the paper's model.",
                stacklevel=2,
            )
    text = {
        "context": values["context_length"],
        "vocab": values["vocab_size"],
        "layers": values["transformer_layers"],
        "width": values["transformer_width"],
        "heads": values["transformer_heads"],
    }
    name = {"name": values["name"]} if "name" in values else {}
    return name | {"embed_dim": values["embed_dim"], "image": image, "text": text}


def _read_yaml(text: str, source: str, default_name: str) -> ModelConfig:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML ({error}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: holds {type(values).__name__}, expected keys such as embed_dim, image, text.")
    return config_from_dict({"name": default_name} | values, source)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _require_positive(config: ViTConfig | ResNetConfig | TextConfig) -> None:
    for name, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        _require(all(number > 0 for number in numbers), f"{name} is {value}, expected numbers above 0")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
