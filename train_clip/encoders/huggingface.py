"""Encoders of the transformers library: by a hub's name or a folder, and from a description.

The class is noted by its name in the library, so that a rebuilt module is of the class that was saved. Code that lies
beside weights is never run.

B  captions      L  tokens      D  width

What a Hugging Face image encoder was trained on, from its preprocessor's file.

The file is read as it is: the image processor that it describes is not made, which would need torchvision.

S  side of the image in pixels
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from typing import Any

import torch
from torch import nn

from train_clip.checkpoints.sources import find_file
from train_clip.encoders.encoder import (
    ImageEncoder,
    Pixels,
    TextEncoder,
    evaluating,
    measured,
    rebuilt,
    text_features,
    three_channels,
)
from train_clip.encoders.hub import (
    check_folder,
    find_transformers,
    from_cache_first,
    in_float32,
    quiet,
    reading,
)
from train_clip.errors import UserError, first_line

# Per-channel mean and deviation of ImageNet, in [0, 1] (torchvision's and transformers' default).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Newer processors write the first, with the image processor under "image_processor"; most models have the second.
FILES = ("processor_config.json", "preprocessor_config.json")


def read_pixels(name: str, config: Any) -> Pixels:
    """Read side, mean and deviation.

    Args:
        name: a hub name or a local folder.
        config: the tower's configuration, whose ``image_size`` stands in where there is no file.

    Raises:
        UserError: no size anywhere, images that are not square, or a treatment of pixels other than a normalisation.
    """
    values = _preprocessor(name)
    if values is None:
        size = getattr(config, "image_size", None)
        if size is None:
            raise UserError(
                f"hf:{name}: found neither preprocessor_config.json nor image_size in config.json; expected one of "
                "them to tell the side of the image. Save the model's image processor into the folder, or write "
                '{"size": 224, "image_mean": [...], "image_std": [...]} there as preprocessor_config.json.'
            )
        _warn_of_default(name)
        return Pixels(_square(size, name, "image_size"), IMAGENET_MEAN, IMAGENET_STD)
    return Pixels(_side(values, name), *_normalisation(values, name))


def _side(values: dict[str, Any], name: str) -> int:
    """Give S: of the crop where there is one, otherwise of the resize (ConvNext's crop ends at its size too)."""
    key = "crop_size" if values.get("do_center_crop") and "crop_size" in values else "size"
    if values.get(key) is None:
        raise UserError(f"hf:{name}: preprocessor_config.json has no {key}. Write the side there, such as 224.")
    return _square(values[key], name, key)


def _square(size: Any, name: str, key: str) -> int:
    """Read 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, dict):
        sides = [size[side] for side in ("height", "width", "shortest_edge") if size.get(side) is not None]
    else:
        sides = list(size) if isinstance(size, list | tuple) else [size]
    if not sides or any(type(side) is not int or side < 1 for side in sides) or len(set(sides)) > 1:
        raise UserError(
            f"hf:{name}: its {key} is {size!r}; expected the side of a square, such as 224. "
            "Take an encoder of square images, or edit the file in a local copy of the model."
        )
    return int(sides[0])


def _normalisation(values: dict[str, Any], name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Give mean and deviation of pixels in [0, 1].

    With a rescaling by f other than 1/255:  (f x - mean) / std = (x / 255 - mean / 255f) / (std / 255f)
    """
    for key in ("do_flip_channel_order", "rescale_offset"):
        if values.get(key):
            raise UserError(
                f"hf:{name}: its preprocessor asks for {key}, which is not supported. Expected (x / 255 - mean) / std "
                "of red, green, blue. Take another encoder."
            )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if values.get("do_normalize", True):
        if "image_mean" not in values or "image_std" not in values:
            _warn_of_default(name)
        mean, std = (_channels(values, key, name) for key in ("image_mean", "image_std"))
    scale = 255 * (values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1)
    if abs(scale - 1) < 1e-6:  # the file's rounding of 1/255
        return mean, std
    return three_channels([m / scale for m in mean]), three_channels([s / scale for s in std])


def _channels(values: dict[str, Any], key: str, name: str) -> tuple[float, float, float]:
    """Read three figures, or give ImageNet's."""
    found = values.get(key, {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}[key])
    try:
        return three_channels(found)
    except (TypeError, ValueError):
        raise UserError(
            f"hf:{name}: {key} in its preprocessor's file is {found!r}; expected three figures: red, green, blue."
        ) from None


def _warn_of_default(name: str) -> None:
    warnings.warn(
        f"hf:{name}: its files do not tell how pixels are normalised. ImageNet's mean and deviation are taken.",
        stacklevel=2,
    )


def _preprocessor(name: str) -> dict[str, Any] | None:
    """Read the image processor's values, or None where the model has no such file."""
    for file in FILES:
        path = find_file(name, file)
        if path is None:
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({first_line(error)}). Copy or download the file again.") from None
        values = values.get("image_processor") if file == FILES[0] else values
        if isinstance(values, dict):
            return values
    return None


# Of a text encoder that does not say how many tokens it takes, as T5, whose positions are relative: what it was trained
# with (arXiv 1910.10683, section 3.1.2).
DEFAULT_CONTEXT = 512

INPUTS = {"image": "pixel_values", "text": "input_ids"}
TOWERS = {"image": "vision_config", "text": "text_config"}

# Towers of two-tower models that the library's own choice by configuration, AutoModel, does not know.
OTHER_TOWERS = {
    "align_text_model": "AlignTextModel",
    "align_vision_model": "AlignVisionModel",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def load_image(name: str) -> ImageEncoder:
    """Load a pretrained image encoder, in float32; of a model with two towers, its image tower.

    Args:
        name: a hub name, such as facebook/dinov2-small, or a local folder.

    Raises:
        UserError: not reachable, not readable, not an image encoder, or weights that do not fit it.
    """
    module = _load(name, "image")
    with reading(name, "image"), quiet():
        pixels = read_pixels(name, module.config)
    return measured(module, pixels, _description(module, name))


def load_text(name: str) -> TextEncoder:
    """Load a pretrained text encoder, in float32; of a model with two towers, its text tower; of T5, its encoder.

    Args:
        name: a hub name, such as sentence-transformers/all-mpnet-base-v2, or a local folder.

    Raises:
        UserError: as ``load_image``.
    """
    return _text_encoder(_load(name, "text"), name)


def build_image(description: dict[str, Any]) -> ImageEncoder:
    """Build an image encoder from its description, with random weights."""
    return rebuilt(_build(description), description)


def build_text(description: dict[str, Any]) -> TextEncoder:
    """Build a text encoder from its description, with random weights."""
    width, context, vocab = (description[key] for key in ("width", "context", "vocab"))
    return TextEncoder(_build(description), width, context, vocab, description)


def describe_image(module: nn.Module, pixels: Pixels) -> dict[str, Any] | None:
    """Describe a live image encoder, such as a user's own ``AutoModel.from_pretrained(...)``.

    Returns:
        What ``build_image`` takes, or None where the module is of no class of transformers.
    """
    if not _is_of_the_library(module):
        return None
    return measured(module, pixels, _description(module, _origin(module))).description


def describe_text(module: nn.Module) -> dict[str, Any] | None:
    """Describe a live text encoder.

    Returns:
        What ``build_text`` takes, or None where the module is of no class of transformers.
    """
    return _text_encoder(module, _origin(module)).description if _is_of_the_library(module) else None


def _text_encoder(module: nn.Module, name: str) -> TextEncoder:
    """Complete a text encoder by its width, its context and its vocabulary, and describe it."""
    device = next(module.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with evaluating(module):
        try:
            output = module(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        except Exception as error:
            raise UserError(
                f"hf:{name}: fails on two tokens ({first_line(error)}). Expected an encoder of captions. Take another."
            ) from error
        width = text_features(output, None, average=True).shape[1]
    context = _context(module)
    vocab = module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    described = {**_description(module, name), "width": width, "context": context, "vocab": vocab}
    return TextEncoder(module, width, context, vocab, described)


def _context(module: Any) -> int:
    """Give the most tokens that a text encoder takes.

    Where positions are counted from the padding's on (RoBERTa: 514 rows, the first two without a token), the table of
    positions has a padding row, and it and the rows before it do not count.
    """
    rows = getattr(module.config, "max_position_embeddings", None)
    if not isinstance(rows, int) or rows < 1:
        return DEFAULT_CONTEXT
    for path, table in module.named_modules():
        if path.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return rows


def _load(name: str, kind: str) -> Any:
    """Read configuration and weights; strictly, but for a pooler that the file does not hold, which is taken off."""
    transformers = find_transformers()
    check_folder(name)
    with reading(name, kind), quiet():
        config = from_cache_first(transformers.AutoConfig.from_pretrained, name)
        config = getattr(config, TOWERS[kind], config)
        module, found = from_cache_first(
            _auto_model(transformers, config, name, kind).from_pretrained,
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; _refuse stops at the first
            **in_float32(transformers),
        )
    if module.main_input_name != INPUTS[kind]:
        raise UserError(
            f"hf:{name}: {type(module).__name__} takes {module.main_input_name}; expected {INPUTS[kind]}. "
            f"Give --{kind}_encoder an encoder of {kind}s."
        )
    missing = set(found["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        module.pooler = None
        missing = set()
    _refuse(name, type(module).__name__, missing, {mismatch[0] for mismatch in found["mismatched_keys"]})
    return module


def _auto_model(transformers: Any, config: Any, name: str, kind: str) -> Any:
    """Choose what reads the weights: for T5 and its like the encoder alone, for others what the configuration says."""
    if kind == "text" and type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if config.model_type in OTHER_TOWERS:
        return getattr(transformers, OTHER_TOWERS[config.model_type])
    if config.is_encoder_decoder:
        raise UserError(
            f"hf:{name}: {config.model_type} is an encoder with a decoder; expected an encoder. "
            "Take one such as hf:sentence-transformers/all-mpnet-base-v2 or hf:google-t5/t5-base."
        )
    return transformers.AutoModel


def _refuse(name: str, kind: str, missing: set[str], mismatched: set[str]) -> None:
    """Stop at weights that are not there, or of another shape: they would stay random."""
    found = [
        f"{len(keys)} of {kind}'s tensors {what}: {', '.join(sorted(keys)[:5])}{' …' if len(keys) > 5 else ''}."
        for keys, what in ((missing, "are not in the file"), (mismatched, "have another shape there"))
        if keys
    ]
    if found:
        raise UserError(
            f"hf:{name}: the weights do not fit. {' '.join(found)} Expected all of them. "
            "Take a model whose config.json and weights belong together."
        )


def _description(module: Any, name: str) -> dict[str, Any]:
    """Describe a module: its class, its configuration as plain data, and whether its pooler was taken off."""
    config = json.loads(module.config.to_json_string(use_diff=False))
    # About the file, its classifier, and the library's own state, which begins with "_".
    left_out = ("architectures", "id2label", "label2id")
    config = {key: value for key, value in config.items() if key not in left_out and not key.startswith("_")}
    without_pooler = getattr(module, "pooler", module) is None
    return {
        "source": "hf",
        "name": name,
        "class": type(module).__name__,
        "config": config,
        "without_pooler": without_pooler,
    }


def _build(description: dict[str, Any]) -> nn.Module:
    """Build the module that ``_description`` described."""
    transformers = find_transformers()
    kind: Any = getattr(transformers, description["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(
            f"hf:{description['name']}: transformers {transformers.__version__} has no model {description['class']}. "
            f"Install transformers {description['config'].get('transformers_version', 'of the time of training')}."
        )
    with quiet():
        config = kind.config_class.from_dict(copy.deepcopy(description["config"]))  # type: ignore[attr-defined]
        # As from_pretrained does it, which is with the same attention.
        module: Any = kind._from_config(config, **in_float32(transformers))  # type: ignore[attr-defined]
    if description["without_pooler"]:
        module.pooler = None
    return module.eval()


def _is_of_the_library(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")  # not imported, no module can be of it
    return (
        transformers is not None
        and isinstance(module, transformers.PreTrainedModel)
        and getattr(transformers, type(module).__name__, None) is type(module)
    )


def _origin(module: Any) -> str:
    return module.config._name_or_path or type(module).__name__
