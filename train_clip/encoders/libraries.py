"""Encoders by name, and from a description: of timm and torchvision without their classifiers, and a CLIP's own towers.

B  captions      L  tokens      D  embedding width
"""

import contextlib
import difflib
import json
from typing import Any

from torch import Tensor, hub, nn

from train_clip.checkpoints.found import fill, find_weights
from train_clip.encoders.encoder import Description, ImageEncoder, Pixels, TextEncoder, measured, rebuilt
from train_clip.encoders.sources import OWN
from train_clip.errors import UserError, first_line
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.optional import optional


class TextTower(nn.Module):
    """The part of a CLIP that embeds captions: its image tower, temperature and bias are taken off."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        clip.visual = nn.Identity()
        clip.register_parameter("logit_scale", None)
        clip.register_parameter("logit_bias", None)
        self.clip = clip

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """Map (B, L) int64 of CLIP's tokenizer to (B, D) float; what follows the end token is never looked at."""
        return self.clip.encode_text(input_ids)


def load_image(name: str) -> ImageEncoder:
    """Load the image tower, projection included, of a CLIP in whatever ``train_clip.load`` takes."""
    return build_image(*_filled(name))


def load_text(name: str) -> TextEncoder:
    """Load the text tower, projection included, of a CLIP in whatever ``train_clip.load`` takes."""
    return build_text(*_filled(name))


def build_image(description: Description, clip: CLIP | None = None) -> ImageEncoder:
    """Take the image tower of a CLIP: with random weights, unless one is given."""
    clip = clip or _random(description)
    return ImageEncoder(clip.visual, clip.embed_dim, clip.image_size, clip.config.mean, clip.config.std, description)


def build_text(description: Description, clip: CLIP | None = None) -> TextEncoder:
    """Take the text tower of a CLIP: with random weights, unless one is given."""
    clip = clip or _random(description)
    return TextEncoder(TextTower(clip), clip.embed_dim, clip.context_length, clip.vocab_size, description)


def _filled(name: str) -> tuple[Description, CLIP]:
    found = find_weights(name).require_clip(
        " and no CLIP. Expected a checkpoint of `train-clip train`, or another CLIP; for encoders of other libraries "
        "use their prefix (hf:NAME)."
    )
    description = {"source": OWN, "name": name, "label": found.config.name, "config": found.config.to_dict()}
    clip = _random(description)
    fill(clip, found.read(), f"{OWN}:{name}")
    return description, clip


def _random(description: Description) -> CLIP:
    return CLIP(config_from_dict(description["config"], description["name"]))


# Where torchvision's classifiers end; the last nn.Linear below is the one that names the classes.
HEADS = ("fc", "classifier", "head", "heads")


def load_timm(name: str) -> ImageEncoder:
    """Load a pretrained image encoder, such as resnet50, vit_small_patch14_dinov2.lvd142m or local-dir:FOLDER."""
    timm = find_library("timm")
    # A prefix is a place of weights, for timm to find.
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise UserError(
            f"timm:{name}: its weights are damaged, or not in this machine's cache and cannot be downloaded "
            f"({first_line(error)}). Download them on a machine with a network (`hf download timm/NAME.TAG --local-dir "
            "FOLDER`) and give the folder: --image_encoder timm:local-dir:FOLDER."
        ) from error
    trained_on = timm.data.resolve_model_data_config(module)
    pixels = Pixels.of(trained_on["input_size"][1], trained_on["mean"], trained_on["std"])
    # What create_model needs: a tag of the name or a folder may be gone by then. timm tells a model's arguments in no
    # public place.
    config = _plain(module.pretrained_cfg)
    arguments = _plain(getattr(module, "_model_args", {})) | {"num_classes": 0}
    description = {"source": "timm", "name": name, "architecture": config["architecture"]}
    description |= {"config": config, "arguments": arguments}
    return measured(module, pixels, description)


def build_timm(description: Description) -> ImageEncoder:
    """Build an image encoder from its description, with random weights."""
    timm = find_library("timm")
    config = dict(description["config"])
    try:
        module = timm.create_model(description["architecture"], pretrained_cfg=config, **description["arguments"])
    except RuntimeError as error:
        raise UserError(
            f"timm:{description['name']}: cannot be built ({first_line(error)}). Install the version of timm that it "
            "was trained with."
        ) from error
    return rebuilt(module, description)


def load_torchvision(name: str) -> ImageEncoder:
    """Load a pretrained classifier, such as resnet50, vit_b_16 or convnext_tiny, up to what its last layer takes."""
    models = _classifiers(name)
    weights = models.get_model_weights(name).DEFAULT
    try:
        module = models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision:{name}: its weights are damaged, or not in this machine's cache and cannot be downloaded "
            f"({first_line(error)}). Copy {weights.url} into {hub.get_dir()}/checkpoints."
        ) from error
    trained_on = weights.transforms()
    pixels = Pixels.of(trained_on.crop_size[0], trained_on.mean, trained_on.std)
    return measured(_without_head(module, name), pixels, {"source": "torchvision", "name": name})


def build_torchvision(description: Description) -> ImageEncoder:
    """Build an image encoder from its description, with random weights."""
    name = description["name"]
    return rebuilt(_without_head(_classifiers(name).get_model(name, weights=None), name), description)


def _classifiers(name: str) -> Any:
    models = find_library("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    return models


def _without_head(module: nn.Module, name: str) -> nn.Module:
    linear = [at for at, part in module.named_modules() if isinstance(part, nn.Linear) and at.split(".")[0] in HEADS]
    if hasattr(module, "aux_logits") or not linear:
        raise UserError(
            f"torchvision:{name}: found no nn.Linear at the end, under {', '.join(HEADS)}, or a second classifier "
            "half-way. Expected a model whose last layer can be removed. Use another one, such as resnet50."
        )
    module.set_submodule(linear[-1], nn.Identity())
    return module


def find_library(module: str) -> Any:
    """Import a library when it is first needed, or say how to install it."""
    return optional(module, "This encoder or model")


def _unknown(library: str, name: str, known: list[str]) -> UserError:
    nearest = ", ".join(difflib.get_close_matches(name, known, cutoff=0))
    return UserError(
        f"{library}:{name}: this version has no such image encoder. Expected one of its list_models(), such as "
        f"{nearest}."
    )


def _plain(values: dict[str, Any]) -> Description:
    """Keep what JSON can hold, and give it as JSON gives it back."""
    kept = {}
    for key, value in values.items():
        with contextlib.suppress(TypeError):
            kept[key] = json.loads(json.dumps(value))
    return kept
