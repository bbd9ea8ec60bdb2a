"""What a Hugging Face image encoder was trained on, from its preprocessor's file.

The file is read as it is: the image processor that it describes is not made, which would need torchvision.

S  side of the image in pixels
"""

from __future__ import annotations

import json
import warnings
from typing import Any

from train_clip.errors import UserError, first_line
from train_clip.models.encoders.encoder import Pixels, three_channels
from train_clip.models.encoders.hub import find_file

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
