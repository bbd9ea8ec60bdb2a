"""A file → an upright RGB picture, or the reason why it is bad.

Pillow drops transparency, turns 16-bit grayscale white, and takes some pixels for others than their file means; all of
this is fixed here, for training and evaluation.
"""

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageFile, UnidentifiedImageError
from PIL import TiffImagePlugin as Tiff

from train_clip.errors import BadSample, MissingSample, UserError
from train_clip.files import opened

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
MAX_PIXELS = 89_478_485  # Pillow's Image.MAX_IMAGE_PIXELS, from which on it warns of a decompression bomb
MAX_BYTES = 2**30  # of a file: some decoders read it whole; the largest picture takes 8 bytes a pixel and its metadata
MIN_SIDE = 2  # pixels; a picture of one row or column holds nothing to learn
MAX_ASPECT = 100  # longer side over shorter side
# Of a JPEG, as in libtiff (LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER); 10 are usual, and each costs a pass over the picture.
MAX_SCANS = 100
MAX_COMMENTS = 1000  # of a PPM in plain text, whose reader takes seconds for a megabyte of them

# What picture collections are made of, by Pillow's names. Its other readers are for formats that nobody collects, hand
# the file to another program (EPS), take nearly anything for a picture, or, as OpenJPEG for JPEG 2000, take as much
# memory as a header asks for, also within the cap on pixels (test_hostile.py, precincts).
FORMATS = tuple("AVIF BMP DIB GIF ICO JPEG MPO PCX PNG PPM PSD QOI SGI TGA TIFF WEBP".split())
ARRAY_SUFFIX = ".npz"  # of an image that is an array (arrays.py)
JPEGS = ("JPEG", "MPO")  # an MPO is a JPEG with others behind it, and read by its reader
JPEG_START = b"\xff\xd8\xff"  # what Pillow knows a JPEG by
TILE_SIDES = (322, 323)  # TIFF 6.0, section 15
# A scan's header (T.81, B.2.3): its length follows from its number of components, which keeps chance finds out.
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
UNKNOWN_RANGE = "integer pixels of unknown range"
# How it is said that a mode became RGB. Gray pictures hold nothing that could be lost.
TO_RGB = {"CMYK": "CMYK or YCCK to RGB", "P": "palette to RGB"}

# What turns a picture upright, by its EXIF orientation (Exif 2.32, section 4.6.4).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDES_SWAPPED = [turn for orientation, turn in UPRIGHT.items() if orientation > 4]
# Pillow's warnings repeat what is checked here (size), or say nothing that helps (EXIF, palettes). This stands among
# the filters while a file is read. Not by catch_warnings, which is not for threads, and after which all that was
# warned of once is warned of again.
PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class Decoded(NamedTuple):
    """A picture, and what had to be fixed to get it."""

    picture: Image.Image  # RGB, upright by its EXIF orientation, on white where it is transparent
    mended: tuple[str, ...]  # in words that are the same for every file that was mended alike


class Jpeg(NamedTuple):
    """A plain JPEG whose pixels are not decoded yet."""

    content: bytes
    size: tuple[int, int]  # width and height as they are stored
    turn: Image.Transpose | None  # what turns it upright


def open_rgb(path: str) -> Image.Image:
    """Decode an image file, as ``read_image``, for who does not ask what was mended."""
    return read_image(path).picture


def read_image(path: str) -> Decoded:
    """Decode an image file of any of ``FORMATS``, known by its content; the first frame where there are several.

    Raises:
        BadSample: the file cannot be read, is damaged, is no image, or is of an absurd size.
    """
    with reading(path, "image"), opened(path) as file:
        return _decoded(path, _open(path, file))


def open_image(path: str) -> Jpeg | Image.Image:
    """Open an image file as ``read_image`` does, but leave it to the caller to decode a plain JPEG."""
    with reading(path, "image"), opened(path) as file:
        picture = _open(path, file)
        if picture.format in JPEGS and picture.mode in ("RGB", "L"):
            return Jpeg(_whole(picture), picture.size, _turn(picture, []))
        return _decoded(path, picture).picture


def upright_rgb(picture: Image.Image, name: str, mended: list[str]) -> Image.Image:
    """Make an opened picture what ``Decoded`` holds; ``mended`` gets what was mended, a ``BadSample`` the name."""
    _load(picture)
    tags = picture.tag_v2 if isinstance(picture, Tiff.TiffImageFile) else {Tiff.PHOTOMETRIC_INTERPRETATION: 1}
    turn = _turn(picture, mended)
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode == "F":
        raise BadSample(name, "floating-point pixels of unknown range")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _narrowed(picture, tags, name, mended)
    elif tags.get(Tiff.SAMPLEFORMAT) == (2,):  # 8 bits with a sign, which Pillow drops
        raise BadSample(name, UNKNOWN_RANGE)
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        mended.append("transparency composited on white")
        # To the bit what Image.alpha_composite gives, in 8 bytes a pixel rather than 20.
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        canvas = Image.new("RGB", picture.size, BACKGROUND)
        canvas.paste(layer, mask=layer)
        return canvas
    if picture.mode == "RGB":
        return picture
    if picture.mode not in ("L", "1"):
        mended.append(TO_RGB.get(picture.mode, f"{picture.mode} to RGB"))
    return picture.convert("RGB")


def _narrowed(picture: Image.Image, tags: Mapping[int, Any], name: str, mended: list[str]) -> Image.Image:
    """Scale a gray picture to 8 bits, with an alpha where a level is transparent; ``tags`` are a TIFF's."""
    levels, hidden = np.asarray(picture), picture.info.get("transparency")
    if levels.min() < 0 or levels.max() > 65_535:
        raise BadSample(name, UNKNOWN_RANGE)
    bits = 12 if tags.get(Tiff.BITSPERSAMPLE) == (12,) else 16
    mended.append(f"{bits}-bit grayscale scaled to 8 bits")
    gray = (levels >> (bits - 8)).astype(np.uint8)
    if tags.get(Tiff.PHOTOMETRIC_INTERPRETATION, 0) == 0:  # white is zero, of 8 bits and fewer to Pillow too
        gray = ~gray
    if hidden is None:
        return Image.fromarray(gray)
    return Image.merge("LA", [Image.fromarray(band) for band in (gray, (levels != hidden) * np.uint8(255))])


def image_suffixes() -> set[str]:
    """The suffixes of the formats that are read, in lower case, with their dot."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def is_npz(path: str) -> bool:
    """Whether a file has an array in place of an image, by its name."""
    return path.lower().endswith(ARRAY_SUFFIX)


def require_sides(path: str, width: int, height: int) -> None:
    """Refuse what is too thin for a picture, with a ``BadSample``."""
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(path, f"a side below {MIN_SIDE} pixels or an aspect ratio above {MAX_ASPECT}")


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Turn whatever is raised while ``what`` is read from a file into a ``BadSample``, and keep Pillow from warning."""
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, PILLOWS_WARNINGS)
    try:
        yield
    except (BadSample, UserError):
        raise
    except Exception as error:
        kind = MissingSample if isinstance(error, FileNotFoundError) else BadSample
        raise kind(path, _reason(what, error)) from error
    finally:
        filters.remove(PILLOWS_WARNINGS)


def _reason(what: str, error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "file does not exist"
        case PermissionError():
            return "no permission to read the file"
        case FileExistsError():
            return "not a regular file"
        case MemoryError():
            return "too large for memory"
        case Image.DecompressionBombError():
            return f"over {MAX_PIXELS:,} pixels"
        case OSError(errno=int()):
            return f"{what} cannot be read ({type(error).__name__})"
    # Decoders raise whatever their format's parser does (OSError, SyntaxError, struct.error, …).
    return f"damaged {what} ({type(error).__name__})"


def _open(path: str, file: Any) -> ImageFile.ImageFile:
    if file.seek(0, os.SEEK_END) > MAX_BYTES:
        raise BadSample(path, f"image file over {MAX_BYTES:,} bytes")
    file.seek(0)
    # A JPEG is read whole in any case, to count its scans.
    content = io.BytesIO(file.read()) if file.peek(3).startswith(JPEG_START) else file
    try:
        picture = Image.open(content, formats=[kind for kind in FORMATS if kind != "MPO"])
    except UnidentifiedImageError:
        file.seek(0)
        raise BadSample(path, _no_image(file.read(512))) from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadSample(path, f"over {MAX_PIXELS:,} pixels")
    require_sides(path, width, height)
    if picture.format in JPEGS and len(SCAN.findall(_whole(picture))) > MAX_SCANS:
        raise BadSample(path, f"JPEG with over {MAX_SCANS} scans")
    if picture.tile and picture.tile[0][0] == "ppm_plain" and _whole(picture).count(b"#") > MAX_COMMENTS:
        raise BadSample(path, f"PPM with over {MAX_COMMENTS:,} comments")
    if isinstance(picture, Tiff.TiffImageFile):
        width, height = (picture.tag_v2.get(tag, 1) for tag in TILE_SIDES)
        if width * height > MAX_PIXELS:
            raise BadSample(path, f"TIFF with tiles over {MAX_PIXELS:,} pixels")
    return picture


def _whole(picture: ImageFile.ImageFile) -> bytes:
    assert picture.fp is not None
    picture.fp.seek(0)
    return picture.fp.read()


def _load(picture: Image.Image) -> None:
    """Load a picture with the pixels that its file means, where Pillow would take them for others."""
    if isinstance(picture, ImageFile.ImageFile) and picture.tile:
        tile, hidden = picture.tile[0], picture.info.get("transparency")
        match picture.format, tile.args:
            case "TIFF", _:
                _prepare_tiff(picture)
            case "PSD", "1":
                picture.tile = [tile._replace(args="1;I")]  # 1 is black, as ImageMagick reads it (psd.c)
            case "PNG", "L;2" | "L;4" as raw if hidden is not None:
                white = 2 ** int(raw[-1]) - 1
                picture.info["transparency"] = (hidden & white) * 255 // white  # scaled as Pillow scales the pixels
            case "PNG", "RGB;16B" if hidden is not None:
                _hide_deep_color(picture, hidden)
    picture.load()


def _prepare_tiff(picture: Any) -> None:
    tags = Tiff.PLANAR_CONFIGURATION, Tiff.FILLORDER, Tiff.PHOTOMETRIC_INTERPRETATION
    planar, order, photometric = map(picture.tag_v2.get, tags)
    if not picture.use_load_libtiff and (planar == 2 or order == 2 or photometric == 6):
        # Pillow takes separate planes for 8 bits, chroma for full resolution, and some bits turned round for an error.
        # Only what is compressed it leaves to libtiff, which reads all, and finds in the file that nothing is.
        picture.tag_v2[Tiff.COMPRESSION] = 5
        picture._setup()
    if picture.use_load_libtiff:
        rawmode, *others = picture.tile[0].args
        # libtiff has brought the bytes into the machine's order.
        picture.tile = [picture.tile[0]._replace(args=(re.sub("BS$", "NS", rawmode), *others))]


def _hide_deep_color(picture: ImageFile.ImageFile, color: tuple[int, int, int]) -> None:
    """Give a PNG of 16 bits a channel its alpha: Pillow keeps the upper bytes, and takes the color for 8 bits."""
    assert picture.fp is not None
    at = picture.fp.tell()
    picture.fp.seek(0)
    lower: Any = Image.open(picture.fp, formats=["PNG"])
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # of PNG's big-endian levels the lower byte
    lower.load()
    picture.fp.seek(at)
    expected = [level >> 8 for level in color] + [level & 255 for level in color]
    bands = zip(picture.split() + lower.split(), expected, strict=True)
    del picture.info["transparency"]
    picture.putalpha(reduce(ImageChops.lighter, (band.point(lambda x, y=y: 255 * (x != y)) for band, y in bands)))


def _decoded(path: str, picture: Image.Image) -> Decoded:
    _load(picture)
    mended: list[str] = []
    # MPO is JPEG with more pictures behind.
    alike = {"MPO": "JPEG", "DIB": "BMP"}
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122, a third of the time
    named, kind = Image.registered_extensions().get(suffix, ""), picture.format or ""
    if suffix and alike.get(named, named) != alike.get(kind, kind):
        mended.append("suffix of another format")
    try:
        frames = getattr(picture, "is_animated", False)
    except Exception:
        # What is broken behind the first frame is no fault of the first frame.
        frames = True
    if frames:
        mended.append("first of several frames")
    return Decoded(upright_rgb(picture, path, mended), tuple(mended))


def _turn(picture: Image.Image, mended: list[str]) -> Image.Transpose | None:
    try:
        if "exif" in picture.info:
            # Opening a JPEG has tried it and kept the error to itself; getexif() is empty from then on.
            Image.Exif().load(picture.info["exif"])
        turn = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken EXIF says nothing about the pixels.
        mended.append("unreadable EXIF ignored")
        return None
    if turn is not None:
        mended.append("rotated upright by EXIF")
    return turn


def _no_image(start: bytes) -> str:
    if not start:
        return "empty file"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "not an image but an HTML page"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "not an image but an SVG drawing"
    if start[4:8] == b"ftyp":
        return "HEIF image or video, which Pillow does not read"
    return "not an image that Pillow can read"
