"""A dual encoder of transformers with the interface of ``DualEncoder``: its own features, temperature and pixels.

B  images or captions      L  tokens      S  side of the image in pixels      D  embedding width
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from train_clip.adapters.families import BICUBIC, BILINEAR, OF_EVERY
from train_clip.adapters.find import TOWERS, family_of, renamed
from train_clip.data.crops import Square
from train_clip.encoders.encoder import Pixels
from train_clip.encoders.huggingface import context_of, quiet
from train_clip.encoders.libraries import find_library
from train_clip.errors import UserError, first_line
from train_clip.models.clip import INITIAL_TEMPERATURE, DualEncoder, PixelNorm, Texts, token_ids

OF_CAPTIONS = ("input_ids", "attention_mask", "token_type_ids")


class AdaptedModel(DualEncoder):
    """Built from ``adapter``, plain data: the family, a name, its ``config.json`` and its image processor's settings.

    Random weights, to be filled. Tensors have the family's own names, those of a tower below ``visual.`` and
    ``transformer.``; a temperature is kept as the logarithm of the factor.
    """

    visual: "Tower"
    transformer: "Tower"

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        family, whole = family_of(adapter), build(adapter)
        pixels = pixels_of(adapter, whole.config)
        super().__init__(
            adapter["name"],
            reduce(getattr, family.width.split("."), whole.config),
            pixels.size,
            context_of(whole.text_model),
            whole.config.text_config.vocab_size,
            1 / INITIAL_TEMPERATURE,
        )
        self.adapter, self.family, self.names_of_layers = adapter, family, family.names_of_layers
        activations = [whole.config.vision_config.hidden_act, whole.config.text_config.hidden_act]
        self.embeds_by = f"{vars(pixels.size)} {activations}"
        self.pixel_norm = PixelNorm(pixels.mean, pixels.std)
        self.visual = Tower(whole, type(whole).get_image_features, *TOWERS["visual."])
        self.transformer = Tower(whole, type(whole).get_text_features, *TOWERS["transformer."])

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(pixel_values=self.pixel_norm(images))

    @override
    def encode_text(self, texts: Texts) -> Tensor:
        named = texts if isinstance(texts, Mapping) else {"input_ids": texts}
        return self.transformer(**{name: named[name] for name in OF_CAPTIONS if name in named})

    @override
    def caption_mask(self, texts: Texts) -> Tensor:
        # Where the last position is the feature, padding is a part of what is read.
        all_tokens = torch.ones_like(token_ids(texts))
        read_all = self.family.padded or not isinstance(texts, Mapping)
        return (all_tokens if read_all else texts.get("attention_mask", all_tokens)).bool()  # type: ignore[union-attr]

    @override
    def clamp_temperature(self) -> None:
        if self.logit_bias is None:  # SigLIP's scale is above 100 in its own files
            super().clamp_temperature()


class Tower(nn.Module):
    """Parts of a model of transformers under their names there, as far as one of its features needs them."""

    def __init__(self, whole: Any, getter: Any, *parts: str) -> None:
        super().__init__()
        self.config = whole.config
        self._getter, self._takes = getter, {*inspect.signature(getter).parameters}
        for name in (part.removesuffix(".") for part in parts):
            if hasattr(whole, name):
                self.add_module(name, getattr(whole, name))
        self.features = nn.Identity()

    def forward(self, **inputs: Tensor) -> Tensor:
        """Map a processor's tensors to features, (B, D)."""
        # The method of the whole model, of which it reads these parts alone; until transformers 5 it gives a tensor.
        output = self._getter(self, **{name: one for name, one in inputs.items() if name in self._takes})
        return self.features(output if isinstance(output, Tensor) else output.pooler_output)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Have each block recompute its activations, as ``PreTrainedModel`` does."""
        blocks: list[Any] = [part for part in self.modules() if hasattr(part, "gradient_checkpointing")]
        if not blocks:
            raise UserError(
                f"gradient_checkpointing: transformers has none for the image tower of {type(self.config).__name__}. "
                "Leave it out; minibatch_size saves memory with any encoder."
            )
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, **gradient_checkpointing_kwargs)


def build(adapter: Mapping[str, Any]) -> Any:
    """Build the library's model of a description, with random weights, in eval mode."""
    transformers = find_library("transformers")
    name, family = adapter["name"], family_of(adapter)
    kind: Any = getattr(transformers, family.model, None)
    if kind is None:
        raise UserError(
            f"{name}: transformers {transformers.__version__} has no {family.model}. Install a newer one: pip install "
            "-U transformers."
        )
    try:
        with quiet():
            config = kind.config_class.from_dict(copy.deepcopy(dict(adapter["config"])))
            # As from_pretrained does it, with the same attention.
            whole: Any = kind._from_config(config, torch_dtype=torch.float32)
    except Exception as error:  # a configuration of any content raises anything
        raise UserError(
            f"{name}: its config.json describes no {family.model} ({type(error).__name__}: {first_line(error)}). Get "
            "the file again."
        ) from error
    return whole.eval()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build without memory for weights that are replaced at once; buffers, not all in files, have their values."""

    def emptied(_: nn.Module, __: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()


def named_as_here(tensors: dict[str, Tensor], adapter: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors under the names that the installed version of transformers has for them."""
    names_of_layers = family_of(adapter).names_of_layers
    with torch.device("meta"):
        known = {*map(renamed, build(adapter).state_dict())} if names_of_layers else set(tensors)

    def here(name: str) -> str:
        written = (name.replace(one, other) for one in names_of_layers for other in names_of_layers)
        return next((one for one in written if one in known), name)

    return {here(name): tensor for name, tensor in tensors.items()}


def pixels_of(adapter: Mapping[str, Any], config: Any) -> Pixels:
    """The square that a processor makes of an image, and its normalization; refuse one that makes another form.

    With a factor f, an offset o of 0 or 1:   (f x - o - mean) / std = (x / 255 - (o + mean) / 255f) / (std / 255f)
    """
    try:
        return _pixels(adapter, config)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # settings of any content
        raise UserError(f"{adapter['name']}: its preprocessor_config.json is damaged ({first_line(error)}).") from error


def _pixels(adapter: Mapping[str, Any], config: Any) -> Pixels:
    family, name = family_of(adapter), adapter["name"]
    values = OF_EVERY | dict(family.pixels) | {key: one for key, one in adapter["processor"].items() if one is not None}

    def refuse(what: str, expected: str) -> UserError:
        return UserError(
            f"{name}: its image processor has {what}; expected {expected}. Change preprocessor_config.json."
        )

    whole, squashed = _sides(values["size"])
    side = _sides(values["crop_size"])[0] if values.get("do_center_crop") else whole
    if not values["do_resize"] or not (squashed or values.get("do_center_crop")) or not 0 < side <= whole:
        sizes = {key: values.get(key) for key in ("do_resize", "size", "do_center_crop", "crop_size")}
        raise refuse(str(sizes), "a square: both sides resized to one number, or the shorter one and a crop")
    of_model = getattr(config.vision_config, "image_size", None)
    if not family.any_size and side != of_model:
        raise refuse(f"images of {side}×{side} pixels", f"the model's {of_model}×{of_model}")
    if values["resample"] not in (BICUBIC, BILINEAR):
        raise refuse(f"resample {values['resample']}", f"{BILINEAR} (bilinear) or {BICUBIC} (bicubic)")
    square = Square(side)
    square.whole, square.squashed = whole, squashed
    square.resampling = "bilinear" if values["resample"] == BILINEAR else "bicubic"
    factor = 255 * (float(values["rescale_factor"]) if values["do_rescale"] else 1)
    if not 0 < factor < float("inf"):
        raise refuse(f"rescale_factor {factor / 255}", "a number above 0")
    offset = 1.0 if values.get("rescale_offset") else 0.0
    mean: Any = [0.0] * 3
    std: Any = [1.0] * 3
    if values["do_normalize"]:
        mean, std = Pixels.of(side, values["image_mean"], values["image_std"], f"{name}: image_mean, image_std")[1:]
    if values.get("include_top"):  # of a classifier, whose pixels are divided once more
        std = [one * other for one, other in zip(std, values["image_std"], strict=True)]
    return Pixels.of(square, [one + offset for one in mean], std, scale=factor)


def _sides(size: Any) -> tuple[int, bool]:
    """A side out of 224, {"height": 224, "width": 224} or {"shortest_edge": 224}, 0 for none; whether both are so."""
    if isinstance(size, Mapping):
        both = size.get("height"), size.get("width")
        size, squashed = (both[0], True) if both[0] == both[1] and both[0] else (size.get("shortest_edge"), False)
    else:
        squashed = False
    return (size, squashed) if type(size) is int else (0, squashed)
