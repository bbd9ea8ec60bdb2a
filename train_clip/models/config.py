"""What a CLIP is made of, and the numbers it is trained with: YAML read into frozen dataclasses.

Sizes of the presets are the paper's (arXiv 2103.00020, tables 19 and 20), optimizer numbers its tables 18 to 20.
"""

import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

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
    """A vision transformer."""

    tower: ClassVar[str] = "train_clip.models.vit:VisionTransformer"  # class: of config, embed_dim, activation
    alike: ClassVar[str] = "ViT-B/32"  # whose optimizer numbers serve where there are none

    size: int  # side of the square input, in pixels
    patch: int  # side of a patch, in pixels
    layers: int
    width: int  # embedding width within the blocks
    heads: int  # attention heads; divides the width

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.size % self.patch == 0, f"image size {self.size} is not a multiple of the patch {self.patch}")
        _require(self.width % self.heads == 0, f"image width {self.width} does not divide into {self.heads} heads")

    @property
    def pixels_per_place(self) -> int:
        """Pixels, along a side, to a place of the grid whose positions are embedded."""
        return self.patch

    def __str__(self) -> str:
        return f"ViT of {self.layers} layers of {self.width}, {self.heads} heads, patches of {self.patch} pixels"


@dataclass(frozen=True)
class ResNetConfig:
    """CLIP's modified ResNet."""

    tower: ClassVar[str] = "train_clip.models.resnet:ModifiedResNet"
    alike: ClassVar[str] = "RN50"
    pixels_per_place: ClassVar[int] = 32  # the total stride

    size: int  # side of the square input, in pixels; a multiple of the stride
    blocks: tuple[int, int, int, int]  # bottlenecks in each of the four stages
    width: int  # channels of the stem (table 19 prints 32 times this)

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.size % 32 == 0, f"image size {self.size} is not a multiple of 32, a ResNet's stride")
        _require(self.width % 2 == 0, f"image width {self.width} is odd; the pooling has width / 2 heads")

    @property
    def layers(self) -> int:
        """Bottlenecks, one after the other."""
        return sum(self.blocks)

    def __str__(self) -> str:
        return f"ResNet of blocks {'-'.join(map(str, self.blocks))}, width {self.width}"


# A new kind of tower: a class like these two, its file, and here the key that only its configuration has.
ImageConfig = ViTConfig | ResNetConfig
TOWERS: dict[str, type[ImageConfig]] = {"blocks": ResNetConfig, "patch": ViTConfig}


@dataclass(frozen=True)
class TextConfig:
    """The text transformer."""

    context: int  # tokens of a caption at most, start and end included
    vocab: int  # number of tokens in the vocabulary
    layers: int
    width: int  # embedding width within the blocks
    heads: int  # attention heads; divides the width

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.context >= 2, f"context {self.context}, expected 2 or above, for start and end")
        _require(self.width % self.heads == 0, f"text width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class OptimizerConfig:
    """The numbers of AdamW and the length of the run."""

    lr: float  # peak learning rate
    betas: tuple[float, float]  # decay of the first and the second moment
    eps: float  # added to the root of the second moment
    weight_decay: float  # decoupled, on matrices and convolutions only
    warmup_steps: int  # optimizer steps until the peak
    epochs: int  # passes over the pairs

    def __post_init__(self) -> None:
        for name, value in {"learning rate": self.lr, "eps": self.eps, "epochs": self.epochs}.items():
            _require(value > 0, f"{name} {value}, expected above 0")
        for name, value in {"weight decay": self.weight_decay, "warmup_steps": self.warmup_steps}.items():
            _require(value >= 0, f"{name} {value}, expected 0 or above")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas {self.betas}, expected from 0 to below 1")

    def options(self) -> dict[str, Any]:
        """The options of an optimizer whose defaults are a model's."""
        return {"learning_rate": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class ModelConfig:
    """One CLIP: two towers, the width where they meet, and the numbers it is trained with."""

    name: str  # how it is called in messages and files
    embed_dim: int  # width of the space where images and captions meet
    image: ImageConfig
    text: TextConfig
    optimizer: OptimizerConfig  # defaults for training it
    activation: str = "quick_gelu"  # OpenAI's models'; or gelu
    mean: tuple[float, float, float] = MEAN  # of each channel: the image tower takes (x / 255 - mean) / std
    std: tuple[float, float, float] = STD
    logit_bias: bool = False  # whether its logits have a bias, as the sigmoid loss learns one: that loss decides

    def __post_init__(self) -> None:
        _require(self.embed_dim > 0, f"embed_dim {self.embed_dim}, expected above 0")
        _require(all(map(math.isfinite, self.mean)), f"mean {self.mean}, expected finite numbers")
        _require(all(0 < value < math.inf for value in self.std), f"std {self.std}, expected finite, above 0")

    @property
    def sizes(self) -> tuple[int, ImageConfig, TextConfig]:
        """What tensors of the same shapes have in common, and their heads."""
        return self.embed_dim, self.image, self.text

    def with_sizes(self, image: int | None = None, context: int | None = None) -> Self:
        """The same model for images of another size, in pixels, and captions of another length, in tokens."""
        of_image = dataclasses.replace(self.image, size=image or self.image.size)
        of_text = dataclasses.replace(self.text, context=context or self.text.context)
        return dataclasses.replace(self, image=of_image, text=of_text)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as a preset file holds them; ``config_from_dict`` reads them back."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        # Left out where there is none: so are the files and runs of before there could be one.
        return values if self.logit_bias else {name: value for name, value in values.items() if name != "logit_bias"}


def read_config(name: str) -> ModelConfig:
    """Look up a preset by its name (``ViT-B/32``, ``ViT-B-32``), or read a YAML file of one's own by its path."""
    path = Path(name)
    if path.suffix.casefold() in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file. --model_name takes a preset or a YAML file.")
        return _read_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path), path.stem)
    for preset in presets():
        if preset.name.replace("/", "-") == name.replace("/", "-"):
            return preset
    known = ", ".join(preset.name for preset in presets())
    raise UserError(f"Unknown model {name!r}. Presets: {known}. For a model of your own give a YAML file.")


@cache
def presets() -> tuple[ModelConfig, ...]:
    """Every model that ships with the package, in the order of their numbered files."""
    folder = resources.files("train_clip.models") / "presets"
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".yaml")}
    return tuple(_read_yaml(files[name], name, name) for name in sorted(files))


def _read_yaml(text: str, source: str, name: str) -> ModelConfig:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML ({error}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: holds {type(values).__name__}, expected keys such as embed_dim, image, text.")
    return config_from_dict({"name": name} | values, source)


def config_from_dict(values: Mapping[str, Any], source: str = "config") -> ModelConfig:
    """Build a configuration from the keys of a preset file, or those of OpenAI's constructor (``FLAT``).

    Raises:
        UserError: a key that is unknown or missing, or sizes that do not fit; ``source`` is named.
    """
    try:
        values = {"name": source} | (_from_flat(values) if "image_resolution" in values else dict(values))
        image = values.get("image", {})
        kind = next((kind for key, kind in TOWERS.items() if isinstance(image, dict) and key in image), ViTConfig)
        if "optimizer" not in values:
            # A model without numbers of its own trains with those of its kind.
            values["optimizer"] = read_config(kind.alike).to_dict()["optimizer"]
        parts = {"image": kind, "text": TextConfig, "optimizer": OptimizerConfig}
        values |= {name: _build(part, values.get(name, {}), name) for name, part in parts.items()}
        return _build(ModelConfig, values, "model")
    except UserError as error:
        raise UserError(f"{source}: {error}. `train-clip models --show ViT-B/32` prints a complete file.") from None


T = TypeVar("T")


def _build(kind: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise UserError(f"{where} is {_shown(values)}, expected keys and values")
    fields = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    required = [name for name, default in fields.items() if default is dataclasses.MISSING]
    _require_keys(values, fields, required, f"under {where!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _typed(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _require_keys(values: Mapping[str, Any], known: Iterable[str], required: list[str], where: str) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"unknown key {unknown[0]!r} {where}; known: {', '.join(known)}")
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{', '.join(missing)} missing {where}")


# YAML 1.1 takes 5e-4 for a word: it wants the point.
NAMES = {float: "a number such as 5.0e-4", int: "a whole number", bool: "true or false"}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value of the type that its field declares; whole numbers serve as floats, lists as tuples."""
    if kinds := typing.get_args(hint) if typing.get_origin(hint) is tuple else ():
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UserError(f"{where} is {_shown(value)}, expected a list of {len(kinds)} numbers")
        return tuple(_typed(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    if not isinstance(value, hint) or is_bool != (hint is bool):
        raise UserError(f"{where} is {_shown(value)}, expected {NAMES.get(hint, 'text')}")
    return value


def _shown(value: Any) -> str:
    # One out of a file can be too large to print.
    is_short = isinstance(value, bool | int | float | str | None) and len(str(value)) <= LONGEST_SHOWN
    return repr(value) if is_short else f"a {type(value).__name__}"


# The keys of OpenAI's constructor, as train-CLIP's files have them, and ours.
FLAT = {
    "image": {"image_resolution": "size", "vision_width": "width", "vision_layers": "layers"},
    "text": {"context_length": "context", "vocab_size": "vocab", "transformer_layers": "layers"}
    | {"transformer_width": "width", "transformer_heads": "heads"},
}


def _from_flat(values: Mapping[str, Any]) -> dict[str, Any]:
    is_vit = isinstance(values.get("vision_layers"), int)
    required = ["embed_dim", *FLAT["image"], *FLAT["text"], *(["vision_patch_size"] if is_vit else [])]
    _require_keys(values, sorted({*required, "name", "vision_patch_size"}), required, "beside image_resolution")
    image, text = ({ours: values[theirs] for theirs, ours in names.items()} for names in FLAT.values())
    if is_vit:
        # 64 channels a head, as OpenAI's constructor sets it.
        image |= {"patch": values["vision_patch_size"], "heads": max(1, image["width"] // 64)}
    else:
        image["blocks"] = image.pop("layers")
        if image["width"] > 128:
            warnings.warn(
                f"A ResNet of width {image['width']}: the paper's have 64 (RN50) to 128 (RN50x64), and train-CLIP's "
                "files four times as much. Divide it by 4 for the paper's model.",
                stacklevel=2,
            )
    return {key: values[key] for key in ("name", "embed_dim") if key in values} | {"image": image, "text": text}


def _require_positive(config: ImageConfig | TextConfig) -> None:
    for name, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        _require(all(number > 0 for number in numbers), f"{name} is {value}, expected numbers above 0")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
