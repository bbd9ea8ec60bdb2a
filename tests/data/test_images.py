"""Opening files: every sort of picture against values worked out by hand, every sort of damage against BadSample."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from train_clip.data import images
from train_clip.data.images import BACKGROUND, FORMATS, MAX_ASPECT, MAX_PIXELS, image_suffixes, open_rgb, read_image
from train_clip.errors import BadSample

ORIENTATION = 0x0112  # the tag's number in Exif 2.32, section 4.6.4
MAKE = 0x010F
IMAGE_WIDTH = 0x0100


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) int64 of what the package decodes, after a look at the mode."""
    picture = open_rgb(str(path))
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(np.int64)


def reason(path: Path) -> str:
    """Why the package refuses a file; its path has to be in the error."""
    with pytest.raises(BadSample) as caught:
        open_rgb(str(path))
    assert caught.value.path == str(path)
    return caught.value.reason


def encoded(picture: Image.Image, kind: str, **how: Any) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **how)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG with its right checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey 8-bit PNG whose header claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def grey_tiff(values: np.ndarray, order: str, sample_format: int) -> bytes:
    """An uncompressed grey TIFF 6.0 put together by hand.

    Args:
        values: (H, W) integers or floats of the width that is written.
        order: < for II, > for MM.
        sample_format: 1 unsigned, 2 signed, 3 floating point.
    """
    height, width = values.shape
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries += [(279, len(content)), (339, sample_format)]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, value in entries:
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(f"{order}HI", 42, 8 + len(content)) + content + directory + struct.pack(f"{order}I", 0)


def over_white(value: Any, alpha: Any) -> Any:
    """What shows of a value under an alpha, both in [0, 255], on white."""
    return (np.asarray(value) * np.asarray(alpha) + 255 * (255 - np.asarray(alpha))) / 255


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPEG", ".webp"])
def test_a_wrong_suffix_is_no_fault(tmp_path: Path, kind: str, suffix: str) -> None:
    """Files are known by their content: one grey level, which every format keeps to within 1, under any suffix."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(Image.new("RGB", (9, 6), (100, 100, 100)), kind))
    assert pixels(path).shape == (6, 9, 3)
    assert np.abs(pixels(path) - 100).max() <= 1


def test_rgb_and_grey_are_kept(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    """Lossless RGB comes back byte for byte; 8-bit grey and black and white thrice beside each other."""
    picture = noise(7, 5)
    picture.save(tmp_path / "rgb.png")
    assert (pixels(tmp_path / "rgb.png") == np.asarray(picture)).all()
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png") == grey[..., None]).all()
    Image.fromarray(grey > 100).save(tmp_path / "two.png")
    assert (pixels(tmp_path / "two.png") == 255 * (grey > 100)[..., None]).all()


def test_grey_with_alpha_on_white(tmp_path: Path) -> None:
    """All 65,536 pairs of grey and alpha in one picture, against the rounded formula, to 1 of 255; the ends exactly."""
    alpha, value = np.mgrid[:256, :256]
    Image.fromarray(np.stack([value, alpha], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "LA"
    found = pixels(tmp_path / "a.png")
    assert np.abs(found - over_white(value, alpha)[..., None]).max() < 1
    assert (found[0] == 255).all()
    assert (found[255, :, 0] == np.arange(256)).all()


def test_rgba_on_white(tmp_path: Path) -> None:
    """Four colours and alphas worked out by hand: hidden, a third, half, solid."""
    stored = [[(9, 99, 200, 0), (255, 0, 0, 85), (0, 0, 0, 128), (12, 34, 56, 255)]] * 2
    shown = [(255, 255, 255), (255, 170, 170), (127, 127, 127), (12, 34, 56)]
    Image.fromarray(np.array(stored, dtype=np.uint8)).save(tmp_path / "a.png")
    assert BACKGROUND == (255, 255, 255)
    assert np.abs(pixels(tmp_path / "a.png")[0] - shown).max() <= 1


def test_transparency_of_a_palette(tmp_path: Path) -> None:
    """A palette with one hidden entry, and with an alpha for each entry, in PNG and GIF."""
    picture = Image.new("P", (3, 2))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2] * 2)
    for kind, how in (("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 51]))):
        (tmp_path / "a").write_bytes(encoded(picture, kind, transparency=how))
        last = (0, 0, 255) if how == 1 else (204, 204, 255)
        assert pixels(tmp_path / "a")[0].tolist() == [[255, 0, 0], [255, 255, 255], list(last)], kind


@pytest.mark.parametrize(("mode", "hidden"), [("L", 4), ("RGB", (3, 4, 5))])
def test_a_hidden_colour(tmp_path: Path, mode: str, hidden: Any) -> None:
    """PNG's tRNS for grey and RGB: that one colour turns white, all others stay."""
    stored = (
        np.arange(12, dtype=np.uint8).reshape(3, 4) if mode == "L" else np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    )
    Image.fromarray(stored).save(tmp_path / "a.png", transparency=hidden)
    found = pixels(tmp_path / "a.png")
    expected = np.broadcast_to(stored[..., None] if mode == "L" else stored, (3, 4, 3)).astype(np.int64)
    expected = np.where((expected == hidden).all(axis=-1, keepdims=True), 255, expected)
    assert (found == expected).all()
    assert (found == 255).all(axis=-1).sum() == 1


def test_cmyk_jpeg(tmp_path: Path) -> None:
    """Printing inks as Adobe stores them (inverted): R = (255 - C)(255 - K) / 255, and so on, to JPEG's precision."""
    for inks in ((0, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0), (60, 20, 200, 90)):
        Image.new("CMYK", (16, 16), inks).save(tmp_path / "a.jpg", quality=95)
        expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
        assert np.abs(pixels(tmp_path / "a.jpg") - expected).max() <= 4


def test_ycck_jpeg(tmp_path: Path) -> None:
    """The same inks as luma and chroma: a CMYK file of YCbCr, its Adobe marker set to 2 (T.872, 6.5.3)."""
    for inks in ((0, 255, 255, 0), (255, 255, 0, 0), (60, 20, 200, 90)):
        cyan, magenta, yellow, black = inks
        luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
        chroma = (128 + (yellow - luma) / 1.772, 128 + (cyan - luma) / 1.402)
        # Pillow inverts what it writes, so the inversion is taken out of luma and chroma, and left in black.
        stored = tuple(min(255, max(0, round(255 - value))) for value in (luma, *chroma))
        content = bytearray(encoded(Image.new("CMYK", (16, 16), (*stored, black)), "JPEG", quality=95))
        transform = content.index(b"Adobe") + 11
        assert content[transform] == 0
        content[transform] = 2
        (tmp_path / "a.jpg").write_bytes(content)
        expected = [(255 - ink) * (255 - black) / 255 for ink in inks[:3]]
        assert np.abs(pixels(tmp_path / "a.jpg") - expected).max() <= 6


ALL_16_BIT = np.arange(65_536, dtype=np.uint16).reshape(256, 256)


def test_16_bit_grey_png(tmp_path: Path) -> None:
    """All 65,536 levels, against the level over 257: within 1, from black to white, never falling."""
    Image.fromarray(ALL_16_BIT).save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png")
    assert np.abs(found - ALL_16_BIT[..., None] / 257).max() < 1
    assert (found.min(), found.max()) == (0, 255)
    assert (np.diff(found[..., 0].ravel()) >= 0).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_grey_tiff(tmp_path: Path, order: str) -> None:
    """The same levels in either byte order, from a file put together by hand."""
    (tmp_path / "a.tif").write_bytes(grey_tiff(ALL_16_BIT, order, 1))
    assert np.abs(pixels(tmp_path / "a.tif") - ALL_16_BIT[..., None] / 257).max() < 1


@pytest.mark.parametrize("largest", [1023, 4095, 65_535])
def test_16_bit_values_in_a_wide_picture(tmp_path: Path, largest: int) -> None:
    """A PGM of more than 8 bits, which Pillow opens as 32-bit integers: against the level over the file's largest."""
    levels = np.linspace(0, largest, 300).round().astype(">u2").reshape(15, 20)
    (tmp_path / "a.pgm").write_bytes(b"P5 20 15 %d\n" % largest + levels.tobytes())
    with Image.open(tmp_path / "a.pgm") as stored:
        assert stored.mode == "I"
    assert np.abs(pixels(tmp_path / "a.pgm") - 255 * levels.astype(float)[..., None] / largest).max() < 1


@pytest.mark.parametrize(
    "levels",
    [
        np.linspace(0, 2**31 - 1, 64).astype(np.int32),
        np.linspace(0, 2**32 - 1, 64).astype(np.uint32),
        np.linspace(-(2**31), 2**31 - 1, 64).astype(np.int32),
        np.linspace(0, 2**16, 64).astype(np.int32),
        np.linspace(-1, 2**16 - 1, 64).astype(np.int32),
        np.linspace(-(2**15), 2**15 - 1, 64).astype(np.int16),
    ],
    ids=["31 bits", "32 bits", "signed", "one above 16 bits", "one below 0", "signed 16 bits"],
)
def test_levels_beyond_16_bits_are_refused(tmp_path: Path, levels: np.ndarray) -> None:
    """A ramp of integers that does not lie in [0, 65,535] is refused like floating point, not cut to two levels."""
    unsigned = levels.dtype == np.uint32
    for order in "<" if unsigned else "<>":  # Pillow reads no unsigned 32-bit integers of the other order
        (tmp_path / "a.tif").write_bytes(grey_tiff(levels.reshape(8, 8), order, 1 if unsigned else 2))
        assert reason(tmp_path / "a.tif") == "integer pixels of unknown range"


@pytest.mark.parametrize("order", ["<", ">"])
def test_levels_of_16_bits_in_32(tmp_path: Path, order: str) -> None:
    """From 0 to 65,535 exactly, in a TIFF of 32-bit integers: as the same levels in 16 bits, within 1."""
    (tmp_path / "a.tif").write_bytes(grey_tiff(ALL_16_BIT.astype(np.int32), order, 2))
    assert np.abs(pixels(tmp_path / "a.tif") - ALL_16_BIT[..., None] / 257).max() < 1


def test_floating_point_tiff(tmp_path: Path) -> None:
    """Its range is unknown, and Pillow's own conversion shows [0, 1] as black: refused."""
    (tmp_path / "a.tif").write_bytes(grey_tiff(np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5), "<", 3))
    assert reason(tmp_path / "a.tif") == "floating-point pixels of unknown range"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_several(tmp_path: Path, kind: str) -> None:
    """Red, then blue: red."""
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a", kind, save_all=True, append_images=[second])
    with Image.open(tmp_path / "a") as stored:
        assert stored.n_frames == 2
    assert np.abs(pixels(tmp_path / "a") - (255, 0, 0)).max() <= 3


# Orientation

# Where the stored picture's row 0 and column 0 lie in the upright one (Exif 2.32, section 4.6.4, tag 274).
CORNERS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels upright by numpy flips and the standard's words."""
    row, column = CORNERS[orientation]
    if row in ("bottom", "right"):
        stored = stored[::-1]
    if column in ("bottom", "right"):
        stored = stored[:, ::-1]
    return stored.swapaxes(0, 1) if row in ("left", "right") else stored


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_orientation(tmp_path: Path, noise: Callable[..., Image.Image], kind: str, orientation: int) -> None:
    """All eight, in four formats, against the same file without the tag, flipped by numpy as the standard words it."""
    picture = noise(17, 11)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.save(tmp_path / "plain", kind)
    picture.save(tmp_path / "turned", kind, exif=exif)
    expected = upright(pixels(tmp_path / "plain"), orientation)
    assert (pixels(tmp_path / "turned") == expected).all()


@pytest.mark.parametrize("orientation", [0, 9, 274, 65_535])
def test_an_orientation_that_is_none_is_left_alone(
    tmp_path: Path, noise: Callable[..., Image.Image], orientation: int
) -> None:
    """Numbers outside 1 to 8 turn nothing."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise(9, 6).save(tmp_path / "a.png", exif=exif)
    assert (pixels(tmp_path / "a.png") == np.asarray(noise(9, 6))).all()


def test_broken_exif_says_nothing_about_the_pixels(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    """Every byte of an EXIF block set to 0, 255 and random ones: the pixels are there, upright or as stored."""
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "camera", 6
    plain, content = (encoded(noise(17, 11), "JPEG", exif=block) for block in (Image.Exif(), exif))
    (tmp_path / "plain.jpg").write_bytes(plain)
    stored = pixels(tmp_path / "plain.jpg")
    start = content.index(b"Exif\0\0")
    end = start - 2 + int.from_bytes(content[start - 2 : start], "big")
    rng = np.random.default_rng(0)
    for place in range(start, end):
        for value in (0, 255, int(rng.integers(256))):
            (tmp_path / "a.jpg").write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            found = pixels(tmp_path / "a.jpg")
            assert any(
                found.shape == turned.shape and (found == turned).all()
                for turned in (upright(stored, orientation) for orientation in CORNERS)
            )


@pytest.mark.parametrize("orientation", CORNERS)
def test_an_orientation_beside_a_broken_tag_counts(
    tmp_path: Path, noise: Callable[..., Image.Image], orientation: int
) -> None:
    """Legible (Pillow reads it) though another tag, a width in letters, cannot be written back: turned all the same."""
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "camera", orientation
    noise(17, 11).save(tmp_path / "plain.jpg")
    content = encoded(noise(17, 11), "JPEG", exif=exif)
    tag = struct.Struct("<H" if b"Exif\0\0II" in content else ">H")
    (tmp_path / "a.jpg").write_bytes(content.replace(tag.pack(MAKE), tag.pack(IMAGE_WIDTH), 1))
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.getexif()[ORIENTATION] == orientation
        assert stored.getexif()[IMAGE_WIDTH] == "camera"
    assert (pixels(tmp_path / "a.jpg") == upright(pixels(tmp_path / "plain.jpg"), orientation)).all()


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (10_000, 1), (201, 2), (2, 201), (10_000, 99)])
def test_absurd_sizes_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """A single row, column or pixel, and sides of more than 100 to 1."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert reason(tmp_path / "a.png") == "a side below 2 pixels or an aspect ratio above 100"


@pytest.mark.parametrize("size", [(2, 2), (200, 2), (3, 300)])
def test_sizes_at_the_limit_are_taken(tmp_path: Path, size: tuple[int, int]) -> None:
    """Two pixels a side, and exactly 100 to 1."""
    assert MAX_ASPECT == 100
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert open_rgb(str(tmp_path / "a.png")).size == size


@pytest.mark.parametrize("cap", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("side", [9_460, 12_000, 13_378, 30_000, 2**31 - 1])
def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, cap: int | None) -> None:
    """A forged header over the cap, where Pillow warns and where it refuses; also where its own cap is taken away."""
    assert 9_459**2 < MAX_PIXELS == 89_478_485
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", cap)
    (tmp_path / "a.png").write_bytes(png(side, side, chunk(b"IDAT", zlib.compress(b"\0" * 100))))
    assert reason(tmp_path / "a.png") == "over 89,478,485 pixels"


def test_a_bomb_in_a_text_chunk(tmp_path: Path) -> None:
    """100 MB of blanks in a compressed comment: refused or passed over, without an error of another kind."""
    comment = chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 100_000_000, 1))
    rows = zlib.compress(b"\0\1\2\3" * 3)
    (tmp_path / "a.png").write_bytes(png(3, 3, comment, chunk(b"IDAT", rows)))
    assert reason(tmp_path / "a.png").startswith("damaged image")


# Damage

DAMAGED = {
    "no bytes": (b"", "empty file"),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image but an HTML page"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image but an SVG drawing"),
    "text": ("ein Bär".encode(), "not an image that Pillow can read"),
    "zeros": (bytes(1000), "not an image that Pillow can read"),
    "JSON": (b'{"error": "rate limit"}', "not an image that Pillow can read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_image(tmp_path: Path, name: str) -> None:
    """What downloads leave behind under the name of a picture."""
    content, expected = DAMAGED[name]
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason(tmp_path / "a.jpg") == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_file(tmp_path: Path, noise: Callable[..., Image.Image], kind: str, share: float) -> None:
    """Cut after a share of its bytes: refused in few words, never filled up with grey."""
    content = encoded(noise(60, 40), kind)
    (tmp_path / "a.jpg").write_bytes(content[: int(share * len(content))])
    found = reason(tmp_path / "a.jpg")
    assert found.startswith(("damaged image (", "not an image"))
    assert not any(letter.isdigit() for letter in found)


def test_a_bad_checksum(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    """One flipped bit in a PNG's pixels, found by the chunk's CRC."""
    content = bytearray(encoded(noise(30, 20), "PNG"))
    content[content.index(b"IDAT") + 200] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    assert reason(tmp_path / "a.png").startswith("damaged image (")


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone, a folder, no permission, not enough memory: a bad sample each."""
    assert reason(tmp_path / "gone.jpg") == "file does not exist"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / "folder.jpg") == "image cannot be read (IsADirectoryError)"
    (tmp_path / "a.png").write_bytes(png(2, 2))
    for error, expected in (
        (PermissionError(13, "Permission denied"), "no permission to read the file"),
        (MemoryError(), "too large for memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(images, "_open", mock.Mock(side_effect=error))
            assert reason(tmp_path / "a.png") == expected


def test_an_interrupt_is_not_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a file is decoded ends the program."""
    (tmp_path / "a.png").write_bytes(png(2, 2))
    monkeypatch.setattr(images, "_open", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_rgb(str(tmp_path / "a.png"))


def test_the_formats_that_are_read() -> None:
    """The usual suffixes, but none of PostScript, nor of what Pillow only knows by name: its stub plugins."""
    Image.init()
    stubs = {kind for kind, (factory, _) in Image.OPEN.items() if is_stub(factory)}
    assert {"HDF5", "GRIB", "BUFR", "WMF"} <= stubs
    assert not (stubs | {"EPS", "PDF", "MPEG"}) & set(FORMATS)
    usual = "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm avif tga ico mpo"
    assert {f".{suffix}" for suffix in usual.split()} <= image_suffixes()


def is_stub(factory: Any) -> bool:
    """Whether a plugin leaves decoding to a handler that a program would have to bring."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS called .jpg is a program: it is no image, and Pillow does not start the interpreter."""
    interpreter = mock.Mock(side_effect=OSError)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", interpreter)
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    assert reason(tmp_path / "a.jpg") == "not an image that Pillow can read"
    interpreter.assert_not_called()
    with Image.open(tmp_path / "a.jpg") as picture, pytest.raises(OSError):
        picture.load()
    interpreter.assert_called_once()


def test_no_file_is_left_open(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    """Fifty good and fifty bad files, against the count of this process's open files before."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    noise(9, 6).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(encoded(noise(9, 6), "PNG")[:60])
    before = len(list(folder.iterdir()))
    for _ in range(50):
        pixels(tmp_path / "good.png")
        reason(tmp_path / "bad.png")
    assert len(list(folder.iterdir())) == before


def test_decoding_says_nothing_on_the_screen(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Pillow's warnings (EXIF, palettes, large pictures) would come once a file: none gets through."""
    exif = Image.Exif()
    exif[MAKE] = "camera"
    content = bytearray(encoded(Image.new("RGB", (9, 9)), "JPEG", exif=exif))
    content[content.index(b"camera") - 4] = 255
    (tmp_path / "a.jpg").write_bytes(content)
    pixels(tmp_path / "a.jpg")
    palette = Image.new("P", (4, 4))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "b.png", transparency=bytes([0, 255]))
    pixels(tmp_path / "b.png")
    assert not recwarn.list


def test_the_process_keeps_its_warnings(tmp_path: Path) -> None:
    """What was warned of once stays said once, and no filter stays behind: neither of a picture nor of a bad file."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"<html>")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        before = list(warnings.filters)
        for name in ("a.png", "b.png", "a.png"):
            warnings.warn("once", stacklevel=1)
            with contextlib.suppress(BadSample):
                pixels(tmp_path / name)
        assert list(warnings.filters) == before
    assert len(said) == 1


# What is mended


def picture_of(mode: str) -> Image.Image:
    """Twelve by ten of one mode."""
    return Image.new(mode, (12, 10), {"RGBA": (9, 9, 9, 128), "LA": (9, 128)}.get(mode, 0))


def turned(orientation: int) -> Image.Exif:
    """An EXIF block of one tag."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def two_frames(kind: str) -> bytes:
    """A red and a blue frame."""
    return encoded(Image.new("RGB", (12, 10), "red"), kind, save_all=True, append_images=[Image.new("RGB", (12, 10))])


def with_exif(content: bytes) -> bytes:
    """A JPEG whose EXIF block holds some bytes."""
    block = b"Exif\0\0" + content
    plain = encoded(picture_of("RGB"), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says YCCK (T.872, 6.5.3)."""
    content = bytearray(encoded(picture_of("CMYK"), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


FOREIGN, FRAMES, UPRIGHT_BY_EXIF = "suffix of another format", "first of several frames", "rotated upright by EXIF"
ON_WHITE, SCALED, PALETTE = "transparency composited on white", "16-bit grayscale scaled to 8 bits", "palette to RGB"
INKS = "CMYK or YCCK to RGB"
PALETTE_OF_TWO = Image.new("RGB", (12, 10), "teal").quantize(2)

MENDED: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "plain JPEG": ("a.jpg", encoded(picture_of("RGB"), "JPEG"), ()),
    "plain JPEG by its other suffixes": ("a.JFIF", encoded(picture_of("RGB"), "JPEG"), ()),
    "progressive JPEG": ("a.jpeg", encoded(picture_of("RGB"), "JPEG", progressive=True), ()),
    "grey JPEG": ("a.jpe", encoded(picture_of("L"), "JPEG"), ()),
    "plain PNG": ("a.PNG", encoded(picture_of("RGB"), "PNG"), ()),
    "grey PNG": ("a.png", encoded(picture_of("L"), "PNG"), ()),
    "black and white PNG": ("a.png", encoded(picture_of("1"), "PNG"), ()),
    "MPO of one picture": ("a.mpo", encoded(picture_of("RGB"), "MPO"), ()),
    "plain BMP": ("a.bmp", encoded(picture_of("RGB"), "BMP"), ()),
    "DIB called BMP": ("a.bmp", encoded(picture_of("RGB"), "DIB"), ()),
    "plain WebP": ("a.webp", encoded(picture_of("RGB"), "WEBP"), ()),
    "plain TIFF": ("a.tif", encoded(picture_of("RGB"), "TIFF"), ()),
    "plain PPM": ("a.ppm", encoded(picture_of("RGB"), "PPM"), ()),
    "grey PPM called PGM": ("a.pgm", encoded(picture_of("L"), "PPM"), ()),
    "PNG called JPEG": ("a.jpg", encoded(picture_of("RGB"), "PNG"), (FOREIGN,)),
    "JPEG called PNG": ("a.PNG", encoded(picture_of("RGB"), "JPEG"), (FOREIGN,)),
    "WebP called JPEG": ("a.b.JPEG", encoded(picture_of("RGB"), "WEBP"), (FOREIGN,)),
    "JPEG called HEIC": ("a.heic", encoded(picture_of("RGB"), "JPEG"), (FOREIGN,)),
    "MPO called JPEG": ("a.jpg", two_frames("MPO"), (FRAMES,)),
    "MPO": ("a.mpo", two_frames("MPO"), (FRAMES,)),
    "MPO called PNG": ("a.png", two_frames("MPO"), (FOREIGN, FRAMES)),
    "animated WebP": ("a.webp", two_frames("WEBP"), (FRAMES,)),
    "animated PNG": ("a.png", two_frames("PNG"), (FRAMES,)),
    "TIFF of two pages": ("a.tiff", two_frames("TIFF"), (FRAMES,)),
    "animated GIF": ("a.gif", two_frames("GIF"), (FRAMES, PALETTE)),
    "EXIF that turns nothing": ("a.jpg", encoded(picture_of("RGB"), "JPEG", exif=turned(1)), ()),
    "EXIF of no orientation": ("a.jpg", encoded(picture_of("RGB"), "JPEG", exif=turned(9)), ()),
    "EXIF that is none, in a PNG": (
        "a.png",
        encoded(picture_of("RGB"), "PNG", exif=b"Exif\0\0no TIFF header at all"),
        ("unreadable EXIF ignored",),
    ),
    "EXIF that is none, in a JPEG": ("a.jpg", with_exif(b"no TIFF header at all"), ("unreadable EXIF ignored",)),
    "16-bit grey PNG": ("a.png", encoded(picture_of("I;16"), "PNG"), (SCALED,)),
    "16-bit grey TIFF": ("a.tif", encoded(picture_of("I;16"), "TIFF"), (SCALED,)),
    "32-bit grey TIFF": ("a.tif", encoded(picture_of("I"), "TIFF"), (SCALED,)),
    "16-bit grey PGM": ("a.pgm", b"P5 12 10 65535\n" + bytes(240), (SCALED,)),
    "RGBA PNG": ("a.png", encoded(picture_of("RGBA"), "PNG"), (ON_WHITE,)),
    "RGBA WebP": ("a.webp", encoded(picture_of("RGBA"), "WEBP"), (ON_WHITE,)),
    "grey PNG with alpha": ("a.png", encoded(picture_of("LA"), "PNG"), (ON_WHITE,)),
    "grey PNG with a hidden level": ("a.png", encoded(picture_of("L"), "PNG", transparency=3), (ON_WHITE,)),
    "RGB PNG with a hidden colour": ("a.png", encoded(picture_of("RGB"), "PNG", transparency=(1, 2, 3)), (ON_WHITE,)),
    "palette PNG with a hidden entry": ("a.png", encoded(PALETTE_OF_TWO, "PNG", transparency=0), (ON_WHITE,)),
    "GIF with a hidden entry": ("a.gif", encoded(PALETTE_OF_TWO, "GIF", transparency=0), (ON_WHITE,)),
    "palette PNG": ("a.png", encoded(PALETTE_OF_TWO, "PNG"), (PALETTE,)),
    "palette GIF": ("a.gif", encoded(PALETTE_OF_TWO, "GIF"), (PALETTE,)),
    "palette BMP": ("a.bmp", encoded(PALETTE_OF_TWO, "BMP"), (PALETTE,)),
    "CMYK JPEG": ("a.jpg", encoded(picture_of("CMYK"), "JPEG"), (INKS,)),
    "YCCK JPEG": ("a.jpg", ycck(), (INKS,)),
    "CMYK TIFF": ("a.tif", encoded(picture_of("CMYK"), "TIFF"), (INKS,)),
    "LAB TIFF": ("a.tif", encoded(picture_of("LAB"), "TIFF"), ("LAB to RGB",)),
    "all at once": ("a.jpg", encoded(picture_of("RGBA"), "PNG", exif=turned(6)), (FOREIGN, UPRIGHT_BY_EXIF, ON_WHITE)),
    **{
        f"EXIF that turns by {number}": (
            "a.jpg",
            encoded(picture_of("RGB"), "JPEG", exif=turned(number)),
            (UPRIGHT_BY_EXIF,),
        )
        for number in range(2, 9)
    },
}


@pytest.mark.parametrize("what", MENDED)
def test_what_is_mended(tmp_path: Path, what: str) -> None:
    """Files of each kind, plain ones too, against what a person would say of them; ``open_rgb`` has the same pixels."""
    name, content, expected = MENDED[what]
    (tmp_path / name).write_bytes(content)
    decoded = read_image(str(tmp_path / name))
    assert decoded.mended == expected
    assert (np.asarray(decoded.picture) == pixels(tmp_path / name)).all()


def test_a_file_without_a_suffix_has_none_of_another_format(tmp_path: Path) -> None:
    """Names as content-addressed stores give them, which tables list: nothing was mended."""
    for name in ("a", "0f3c", "u.jpg/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture_of("RGB"), "JPEG"))
        assert read_image(str(tmp_path / name)).mended == ()


def test_broken_frames_are_no_fault_of_the_first(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    """A TIFF whose second page is of another mode and size, with each pointer to a next page broken: the first page."""
    first, second = noise(16, 12), Image.new("L", (5, 30), 77)
    content = encoded(first, "TIFF", save_all=True, append_images=[second, noise(9, 9)])
    pointers, place = [], struct.unpack_from("<I", content, 4)[0]
    while place:
        pointers.append(place + 2 + 12 * struct.unpack_from("<H", content, place)[0])
        place = struct.unpack_from("<I", content, pointers[-1])[0]
    assert len(pointers) == 3
    for pointer in pointers:
        for wrong in (len(content) - 3, len(content) + 100, 9, 2**32 - 1):
            broken = bytearray(content)
            struct.pack_into("<I", broken, pointer, wrong)
            (tmp_path / "a.tif").write_bytes(broken)
            decoded = read_image(str(tmp_path / "a.tif"))
            assert decoded.mended == (FRAMES,)
            assert (np.asarray(decoded.picture) == np.asarray(first)).all()


FILM = "HEIF image or video, which Pillow does not read"
NO_IMAGES = {
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", FILM),
    "HEIF of an unknown camera": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1", FILM),
    "a film": (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", FILM),
    "HTML behind blanks and a mark": (b"\xef\xbb\xbf \r\n<HTML lang='en'>", "not an image but an HTML page"),
    "HTML without its first tag": (b"<head><title>404</title>", "not an image but an HTML page"),
    "SVG behind a declaration": (
        b'<?xml version="1.0"?>\n<!-- a --><svg width="9">',
        "not an image but an SVG drawing",
    ),
    "XML that is no drawing": (
        b'<?xml version="1.0"?>\n<Error>AccessDenied</Error>',
        "not an image that Pillow can read",
    ),
    "SVG far within text": (b"a drawing is a <svg>", "not an image that Pillow can read"),
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_why_it_is_no_image(tmp_path: Path, what: str) -> None:
    """First bytes by hand (ISO 14496-12, 4.3; WHATWG's sniffing of HTML), against the words for each."""
    content, expected = NO_IMAGES[what]
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason(tmp_path / "a.jpg") == expected
