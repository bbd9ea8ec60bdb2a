"""Image encoders of the timm library: by its name, and from a description."""

from __future__ import annotations

import difflib
import importlib
import json
from typing import Any

from train_clip.encoders.encoder import ImageEncoder, Pixels, measured, rebuilt, three_channels
from train_clip.errors import UserError, first_line


def load_image(name: str) -> ImageEncoder:
    """Load a pretrained image encoder without its classifier.

    Args:
        name: such as resnet50 or vit_small_patch14_dinov2.lvd142m; or local-dir:FOLDER, a copy of such a model.

    Raises:
        UserError: an unknown name, weights that are not reachable, or an encoder of other than colour images.
    """
    timm = _timm()
    _check_name(timm, name)
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise UserError(f"timm:{name}: {_advice(name, first_line(error))}") from error
    trained_on = timm.data.resolve_model_data_config(module)
    channels, height, width = trained_on["input_size"]
    if channels != 3 or height != width:
        raise UserError(
            f"timm:{name}: takes images of {channels} × {height} × {width}; expected 3 channels and a square. "
            "Take another encoder."
        )
    pixels = Pixels(height, three_channels(trained_on["mean"]), three_channels(trained_on["std"]))
    return measured(module, pixels, _description(module, name))


def build_image(description: dict[str, Any]) -> ImageEncoder:
    """Build an image encoder from its description, with random weights."""
    architecture, config, arguments = (description[key] for key in ("architecture", "config", "arguments"))
    try:
        module = _timm().create_model(architecture, pretrained=False, pretrained_cfg=dict(config), **arguments)
    except RuntimeError as error:
        raise UserError(
            f"timm:{description['name']}: cannot be built ({first_line(error)}). Install the version of timm that it "
            "was trained with."
        ) from error
    return rebuilt(module.eval(), description)


def _description(module: Any, name: str) -> dict[str, Any]:
    """Describe a module by what ``create_model`` needs: a tag of the name or a folder may be gone by then."""
    config = {key: value for key, value in module.pretrained_cfg.items() if _is_plain(value)}
    arguments = {key: value for key, value in getattr(module, "_model_args", {}).items() if _is_plain(value)}
    return {
        "source": "timm",
        "name": name,
        "architecture": config["architecture"],
        "config": json.loads(json.dumps(config)),
        "arguments": json.loads(json.dumps({**arguments, "num_classes": 0})),
    }


def _advice(name: str, reason: str) -> str:
    """Say what to do about weights that could not be read."""
    if name.startswith("local-dir:"):
        return f"cannot be loaded ({reason}). Give the folder that `hf download` or timm's save_for_hf wrote."
    return (
        f"its weights are not in this machine's cache and not reachable ({reason}). Download them where there is a "
        f"network (`hf download timm/{name} --local-dir FOLDER`, the name with its tag) and give the folder: "
        "--image_encoder timm:local-dir:FOLDER."
    )


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _check_name(timm: Any, name: str) -> None:
    """Stop at an architecture that timm does not have; what has a prefix is a place of weights, for timm to find."""
    architecture = name.partition(".")[0]
    if ":" in name or timm.is_model(architecture):
        return
    close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"Similar: {', '.join(close)}." if close else "timm.list_models() gives its names."
    raise UserError(f"timm:{name}: timm {timm.__version__} has no such model. {hint}")


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"timm: encoders of this source need the package timm ({first_line(error)}). Install it: pip install timm."
        ) from None
