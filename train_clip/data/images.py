"""A file → an upright RGB picture, or the reason why not.

Pillow drops transparency and turns 16-bit grey white; both are mended here. Training and evaluation open files alike.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from train_clip.errors import BadSample

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
MAX_PIXELS = 178_956_970  # twice Pillow's Image.MAX_IMAGE_PIXELS, where Pillow itself refuses
MIN_SIDE = 2  # pixels; a picture of one row or column holds nothing to learn
MAX_ASPECT = 100  # longer side over shorter side

# Formats that Pillow hands to another program (Ghostscript), only knows by name, or that are no pictures.
NOT_PICTURES = {"EPS", "PDF", "WMF", "HDF5", "GRIB", "BUFR", "FITS", "MPEG"}

# What turns a picture upright, by its EXIF orientation (Exif 2.32, section 4.6.4).
ORIENTATION_TAG = ExifTags.Base.Orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's warnings repeat what is checked here (size), or say nothing that helps (EXIF, palettes).
warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def image_formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_PICTURES))


def open_rgb(path: str) -> Image.Image:
    """Decode an image file; the first frame where there are several.

    Args:
        path: of any format in ``image_formats``.

    Returns:
        An RGB picture, upright by its EXIF orientation, on white where it is transparent.

    Raises:
        BadSample: the file cannot be read, is damaged, is no image, or is of an absurd size.
    """
    try:
        with Path(path).open("rb") as file:
            return _decode(path, file)
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample(path, "not an image that Pillow can read") from None
    except FileNotFoundError:
        raise BadSample(path, "file is gone") from None
    except PermissionError:
        raise BadSample(path, "no permission to read the file") from None
    except Image.DecompressionBombError:
        raise BadSample(path, f"over {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise BadSample(path, "too large for memory") from None
    except Exception as error:
        # Pillow's decoders raise whatever their format's parser does (OSError, SyntaxError, struct.error, …).
        raise BadSample(path, f"damaged image ({type(error).__name__})") from error


def _decode(path: str, file: BinaryIO) -> Image.Image:
    picture = Image.open(file, formats=image_formats())
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadSample(path, f"over {MAX_PIXELS:,} pixels")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(path, f"a side under {MIN_SIDE} pixels or an aspect over {MAX_ASPECT}")
    picture.load()
    return upright_rgb(picture, path)


def upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Turn an opened picture upright and make it RGB, on white where it is transparent.

    Args:
        picture: of any mode.
        name: for the error.

    Raises:
        BadSample: pixels of unknown range.
    """
    return _to_rgb(name, _upright(picture))


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(picture.getexif().get(ORIENTATION_TAG, 1))
    except Exception:
        # Broken EXIF says nothing about the pixels.
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(path: str, picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BadSample(path, "floating-point pixels of unknown range")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65_535:
            raise BadSample(path, "integer pixels of unknown range")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
