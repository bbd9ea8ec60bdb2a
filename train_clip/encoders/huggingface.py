"""Encoders of the transformers library: by hub name or folder, from a description, or from a model object.

Code that comes with weights is never run. Local files are used before the hub is asked.
"""

import contextlib
import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from train_clip.checkpoints import read, sources
from train_clip.encoders import encoder, libraries
from train_clip.encoders.encoder import Description, ImageEncoder, Pixels, TextEncoder
from train_clip.errors import UserError, first_line

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; torchvision's and transformers' default
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_CONTEXT = 512  # of relative positions (T5, arXiv 1910.10683, section 3.1.2), and of most others
TOWERS = {"image": "vision_config", "text": "text_config"}  # of two-tower models
# Towers of two-tower models that the library's own choice by configuration, AutoModel, does not know.
OTHER_TOWERS = {
    "align_text_model": "AlignTextModel",
    "align_vision_model": "AlignVisionModel",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def load_image(name: str) -> ImageEncoder:
    """Load a pretrained image encoder by its hub name or folder; of a model with two towers, its image tower."""
    module = _load(name, "image")
    with reading(name, "image encoder"), quiet():
        pixels = _pixels(name, module.config)
    return encoder.measured(module, pixels, _description(module, name))


def load_text(name: str) -> TextEncoder:
    """Load a pretrained text encoder by its hub name or folder; of two towers the text's, of T5 its encoder."""
    module = _load(name, "text")
    return _measured_text(module, True, _description(module, name))


def build_image(description: Description) -> ImageEncoder:
    """Build an image encoder from its description, with random weights."""
    return encoder.rebuilt(_build(description), description)


def build_text(description: Description) -> TextEncoder:
    """Build a text encoder from its description, with random weights."""
    width, context, vocab = (description[key] for key in ("width", "context", "vocab"))
    return TextEncoder(_build(description), width, context, vocab, description)


def live_image_encoder(module: torch.nn.Module, pixels: Pixels) -> ImageEncoder:
    """Take an image encoder of the user's own, in float32; a model of the library is described, to be rebuilt."""
    return _verified(
        encoder.measured(module.float(), pixels, _live_description(module)), encoder.image_trial, pixels.size
    )


def live_text_encoder(module: torch.nn.Module, average: bool) -> TextEncoder:
    """Take a text encoder of the user's own, in float32: a model of the library, or one that gives (B, D)."""
    return _verified(_measured_text(module.float(), average, _live_description(module)), encoder.text_trial, average)


def _load(name: str, kind: str) -> Any:
    """Read configuration and weights; strictly, but for a pooler that the file does not hold, which is taken off."""
    transformers = libraries.find_library("transformers")
    with reading(name, f"{kind} encoder"), quiet():
        config = from_cache_first(transformers.AutoConfig.from_pretrained, name)
        config = getattr(config, TOWERS[kind], config)
        module, found = from_cache_first(
            _auto_model(transformers, config, name, kind).from_pretrained,
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused below
            torch_dtype=torch.float32,  # from 4.56 on dtype, which earlier versions do not take
        )
    missing = {*found["missing_keys"], *(mismatch[0] for mismatch in found["mismatched_keys"])}
    if missing and all(key.startswith("pooler.") for key in missing):
        module.pooler = None
    elif missing:  # they would stay random
        raise UserError(
            f"hf:{name}: the weights do not fit. {len(missing)} of {type(module).__name__}'s tensors are not in the "
            f"file, or have another shape there, such as {', '.join(sorted(missing)[:5])}. Expected all of them. Use "
            "a model whose config.json and weights belong together."
        )
    # A copy: these weights may be a mapped file, with which they would change.
    return copy.deepcopy(module)


def _auto_model(transformers: Any, config: Any, name: str, kind: str) -> Any:
    """Choose what reads the weights: for T5 and its like the encoder alone, for others what the configuration says."""
    if kind == "text" and type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if config.model_type in OTHER_TOWERS:
        return getattr(transformers, OTHER_TOWERS[config.model_type])
    if config.is_encoder_decoder:
        raise UserError(
            f"hf:{name}: {config.model_type} is an encoder with a decoder; expected an encoder. Use one such as "
            "hf:sentence-transformers/all-mpnet-base-v2 or hf:google-t5/t5-base."
        )
    return transformers.AutoModel


def _pixels(name: str, config: Any) -> Pixels:
    """Read what an image encoder was trained on: not by its image processor, which would need torchvision.

    With a rescaling by f other than 1/255:  (f x - mean) / std = (x / 255 - mean / 255f) / (std / 255f)
    """
    values = _preprocessor(name) or {"size": getattr(config, "image_size", None)}
    side = _side(values, name)
    for key in ("do_flip_channel_order", "rescale_offset"):
        if values.get(key):
            raise UserError(
                f"hf:{name}: its preprocessor asks for {key}, which is not supported. Expected (x / 255 - mean) / std "
                "of red, green, blue. Use another encoder."
            )
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize", True):
        if "image_mean" not in values or "image_std" not in values:
            warnings.warn(
                f"hf:{name}: its files do not say how pixels are normalized. Using ImageNet's mean and standard "
                "deviation.",
                stacklevel=3,
            )
        mean, std = values.get("image_mean", IMAGENET_MEAN), values.get("image_std", IMAGENET_STD)
    scale = 255 * (values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1)
    scale = 1 if abs(scale - 1) < 1e-6 else scale  # the file's rounding of 1/255
    return Pixels.of(side, mean, std, f"hf:{name}: image_mean and image_std in its preprocessor's file", scale)


def _preprocessor(name: str) -> dict[str, Any]:
    # Newer processors write the first, with the image processor under "image_processor"; most models have the second.
    for file in (sources.HF_PROCESSOR, sources.HF_PIXELS):
        if (path := sources.find_file(name, file)) is not None:
            values = read.read_json(path)
            values = values if file == sources.HF_PIXELS else values.get("image_processor", ())
            if isinstance(values, dict):
                return values
    return {}


def _side(values: dict[str, Any], name: str) -> int:
    """Read 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    # Without a crop the side that is resized to: ConvNext's resize by a crop_pct ends in a crop of its size too.
    key = "crop_size" if values.get("do_center_crop") and "crop_size" in values else "size"
    size: Any = values.get(key)
    sides = size if isinstance(size, list | tuple) else [size]
    if isinstance(size, dict):
        sides = [size[side] for side in ("height", "width", "shortest_edge") if size.get(side)]
    if any(type(side) is not int or side < 1 for side in sides) or len(set(sides)) != 1:
        raise UserError(
            f"hf:{name}: its {key} is {size!r} (preprocessor_config.json, or image_size in config.json); expected the "
            "side of a square, such as 224. Use an encoder for square images, or write preprocessor_config.json into a "
            'local copy of the model, such as {"size": 224, "image_mean": [...], "image_std": [...]}.'
        )
    return sides[0]


def _measured_text(module: Any, average: bool, description: Description) -> TextEncoder:
    """Complete a text encoder by its width; one of the library's own by its context and its vocabulary too."""
    width = encoder.text_trial(module, average, description).shape[1]
    if not description:
        return TextEncoder(module, width, None, None, {})
    told = {"width": width, "context": context_of(module), "vocab": module.get_input_embeddings().num_embeddings}
    return TextEncoder(module, **told, description=description | told)


def context_of(module: Any) -> int:
    """The most tokens that a text model of the library takes."""
    rows = getattr(module.config, "max_position_embeddings", None) or 0
    if rows < 1:
        return DEFAULT_CONTEXT
    # RoBERTa counts positions from the padding's on: its row and those before it (2 of 514) never hold a token.
    for path, table in module.named_modules():
        if path.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            return int(table.num_embeddings - table.padding_idx - 1)
    return rows


def _description(module: Any, name: str) -> Description:
    config = json.loads(module.config.to_json_string(use_diff=False))
    # About the file, its classifier, and the library's own state, which begins with "_".
    left_out = ("architectures", "id2label", "label2id")
    return {
        "source": "hf",
        "name": name,
        "class": type(module).__name__,
        "config": {key: value for key, value in config.items() if key not in left_out and not key.startswith("_")},
        "without_pooler": getattr(module, "pooler", module) is None,
    }


def _live_description(module: Any) -> Description:
    # Of one of the library's own classes, which alone can be built again.
    kind = type(module)
    if getattr(sys.modules.get("transformers"), kind.__name__, None) is not kind:
        return {}
    return _description(module, module.config.name_or_path or kind.__name__)


def _verified(live: Any, trial: Any, how: Any) -> Any:
    """Drop a description that does not make this very module: a layer may have been changed, taken out or added."""
    module, description = live.module, live.description
    if not description:
        return live
    built = _build(description).to(next(module.parameters()).device)
    with contextlib.suppress(RuntimeError):
        built.load_state_dict(module.state_dict())
        if torch.equal(trial(built, how, description), trial(module, how, description)):
            return live
    return dataclasses.replace(live, description={})


def _build(description: Description) -> torch.nn.Module:
    transformers = libraries.find_library("transformers")
    kind: Any = getattr(transformers, description["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(
            f"hf:{description['name']}: transformers {transformers.__version__} has no model {description['class']}. "
            f"Install transformers {description['config'].get('transformers_version', 'of the time of training')}."
        )
    with quiet():
        config = kind.config_class.from_dict(copy.deepcopy(description["config"]))  # type: ignore[attr-defined]
        # As from_pretrained does it, which is with the same attention; the public AutoModel chooses a class of its own.
        module: Any = kind._from_config(config, torch_dtype=torch.float32)  # type: ignore[attr-defined]
    if description["without_pooler"]:
        module.pooler = None
    return module.eval()


def from_cache_first(load: Any, name: str, **arguments: Any) -> Any:
    """Read what is on this machine; ask the hub only for what is not: without a network it is asked for 20 s a file."""
    try:
        return load(name, local_files_only=True, trust_remote_code=False, **arguments)
    except OSError:
        return load(name, trust_remote_code=False, **arguments)


@contextlib.contextmanager
def reading(name: str, part: str) -> Iterator[None]:
    """Turn what the library raises into one message: the model, its part (such as "tokenizer"), and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = "cannot be loaded"
        advice = "Copy or download all of its files again, or use another model or version of transformers."
        if isinstance(error, OSError) and not Path(name).is_dir():
            what = "is not a folder, not in this machine's cache, and cannot be downloaded"
            advice = f"On a machine with a network, run `hf download {name} --local-dir FOLDER`; give hf:FOLDER."
        raise UserError(f"hf:{name}: the {part} {what} ({first_line(error)}). {advice}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress over weights, the table of unused ones and the retries; downloads keep their bar."""
    chatter, hub = libraries.find_library("transformers.utils.logging"), libraries.find_library("huggingface_hub.utils")
    with contextlib.ExitStack() as undo:
        for log in (chatter, hub.logging):
            undo.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
        if chatter.is_progress_bar_enabled():
            undo.callback(chatter.enable_progress_bar)
        hub_bars = not hub.are_progress_bars_disabled()
        chatter.disable_progress_bar()  # the hub's too
        if hub_bars:
            hub.enable_progress_bars()
        yield
