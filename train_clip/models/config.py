"""The configuration of a CLIP and its training hyperparameters: YAML read into frozen dataclasses.

Sizes of the presets are the paper's (arXiv 2103.00020, tables 19 and 20), optimizer numbers its tables 18 to 20.
"""

import json
import math
import reprlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from train_clip.errors import UsageError, UserError, did_you_mean
from train_clip.files import read_yaml

# Per-channel mean and deviation of CLIP's training images, in [0, 1] (openai/CLIP, clip.py, _transform).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

OWN_MODEL = "model.yaml"  # in a run's folder: its model, where no preset's name builds it

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
        _require(self.width % self.heads == 0, f"image width {self.width} is not a multiple of the {self.heads} heads")

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

    context: int  # maximum number of tokens in a caption, including start and end
    vocab: int  # number of tokens in the vocabulary
    layers: int
    width: int  # embedding width within the blocks
    heads: int  # attention heads; divides the width

    def __post_init__(self) -> None:
        _require_positive(self)
        _require(self.context >= 2, f"context {self.context}, expected 2 or above, for start and end")
        _require(self.width % self.heads == 0, f"text width {self.width} is not a multiple of the {self.heads} heads")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's hyperparameters and the length of the run."""

    lr: float  # peak learning rate
    betas: tuple[float, float]  # decay of the first and the second moment
    eps: float  # added to the root of the second moment
    weight_decay: float  # decoupled, on matrices and convolutions only
    warmup_steps: int  # optimizer steps until the peak
    epochs: int  # passes over the pairs

    def __post_init__(self) -> None:
        # The others become options of a run, and are held to what is asked of those.
        _require(self.epochs > 0, f"epochs {self.epochs}, expected above 0")
        _require(self.warmup_steps >= 0, f"warmup_steps {self.warmup_steps}, expected 0 or above")

    def options(self) -> dict[str, Any]:
        """The options of an optimizer whose defaults are a model's."""
        return {"learning_rate": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class ModelConfig:
    """One CLIP: two towers, the embedding width, and its training hyperparameters."""

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
        of_image = replace(self.image, size=image or self.image.size)
        return replace(self, image=of_image, text=replace(self.text, context=context or self.text.context))

    def preset(self) -> "ModelConfig | None":
        """The preset of these sizes, if there is one."""
        return next((preset for preset in presets() if preset.sizes == self.sizes), None)

    def named_as_preset(self) -> Self:
        """This model with the name and the optimizer's numbers of the preset of its sizes."""
        preset = self.preset()
        return replace(self, name=preset.name, optimizer=preset.optimizer) if preset else self

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as a preset file holds them; ``config_from_dict`` reads them back."""
        values = json.loads(json.dumps(asdict(self)))
        # Left out where there is none: so are the files and runs of before there could be one.
        if not self.logit_bias:
            del values["logit_bias"]
        return values


def read_config(name: str) -> ModelConfig:
    """Look up a preset by its name (``ViT-B/32``, ``ViT-B-32``), or read a YAML file of one's own by its path.

    Raises:
        UserError: no such preset, a file that cannot be read, or sizes that do not fit.
    """
    path = Path(name)
    if path.suffix.casefold() in (".yaml", ".yml"):
        config = _read_yaml(path)
        # Made from a preset, it is another model; a run's own copy has the name of the model that was trained.
        is_own = path.name != OWN_MODEL and any(config.name == preset.name for preset in presets())
        return replace(config, name=path.stem) if is_own else config
    for preset in presets():
        if preset.name.replace("/", "-") == name.replace("/", "-"):
            return preset
    known = [preset.name for preset in presets()]
    raise UsageError(
        f"Unknown model {name!r}.{did_you_mean(name, known)} Presets: {', '.join(known)}. For your own model give a "
        "YAML file."
    )


@cache
def presets() -> tuple[ModelConfig, ...]:
    """Every model that ships with the package, in the order of their numbered files."""
    return tuple(map(_read_yaml, sorted(Path(__file__).with_name("presets").glob("*.yaml"))))


def _read_yaml(path: Path) -> ModelConfig:
    values = read_yaml(path, "a preset's name, or YAML with keys such as embed_dim, image, text")
    return config_from_dict({"name": path.stem} | values, str(path))


def config_from_dict(values: Mapping[str, Any], source: str = "config") -> ModelConfig:
    """Build a configuration from the keys of a preset file, or those of OpenAI's constructor (``FLAT``).

    Raises:
        UserError: a key that is unknown or missing, or sizes that do not fit; ``source`` is named.
    """
    try:
        values = {"name": source, **values}
        if "image_resolution" in values:
            values = _from_flat(values)
        image = values.get("image")
        kind = next((kind for key, kind in TOWERS.items() if isinstance(image, dict) and key in image), ViTConfig)
        parts = {"image": kind, "text": TextConfig, "optimizer": OptimizerConfig}
        values |= {name: _build(part, values[name], name) for name, part in parts.items() if name in values}
        if "optimizer" not in values:
            # A model without numbers of its own trains with those of its kind.
            values["optimizer"] = read_config(kind.alike).optimizer
        return _build(ModelConfig, values, "model")
    except UserError as error:
        raise UserError(f"{source}: {error}. `train-clip models --show ViT-B/32` prints a complete file.") from None


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} is {reprlib.repr(values)}, expected keys and values")
    defaults = {field.name: field.default for field in fields(kind)}
    required = [name for name, default in defaults.items() if default is MISSING]
    _require_keys(values, defaults, required, f"under {where!r}")
    hints = get_type_hints(kind)
    return kind(**{key: _typed(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _require_keys(values: Mapping[str, Any], known: Collection[str], required: list[str], where: str) -> None:
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"unknown key {unknown[0]!r} {where}; known: {', '.join(known)}")
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{', '.join(missing)} missing {where}")


# YAML 1.1 takes 5e-4 for a word: it wants the point.
NAMES = {float: "a number such as 5.0e-4", int: "a whole number", bool: "true or false"}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value of the type that its field declares; whole numbers serve as floats, lists as tuples."""
    kinds = get_args(hint)  # of a tuple's items, or of towers
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UserError(f"{where} is {reprlib.repr(value)}, expected a list of {len(kinds)} numbers")
        return tuple(_typed(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) not in (hint, *kinds):
        raise UserError(f"{where} is {reprlib.repr(value)}, expected {NAMES.get(hint, 'text')}")
    return value


# The keys of OpenAI's constructor, as train-CLIP's files have them, and ours.
FLAT = {
    "image": {"image_resolution": "size", "vision_width": "width", "vision_layers": "layers"},
    "text": {"context_length": "context", "vocab_size": "vocab", "transformer_layers": "layers"}
    | {"transformer_width": "width", "transformer_heads": "heads"},
}


def _from_flat(values: Mapping[str, Any]) -> dict[str, Any]:
    is_vit = isinstance(values.get("vision_layers"), int)
    known = ["name", "embed_dim", *FLAT["image"], *FLAT["text"], "vision_patch_size"]
    _require_keys(values, known, known if is_vit else known[:-1], "beside image_resolution")
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
    return {"name": values["name"], "embed_dim": values["embed_dim"], "image": image, "text": text}


def _require_positive(config: ImageConfig | TextConfig) -> None:
    for name, value in vars(config).items():
        least = min(value) if isinstance(value, tuple) else value
        _require(least > 0, f"{name} is {value}, expected numbers above 0")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
