"""Gray levels, colors and the transparent one of PNG, TIFF and PSD, against values worked out without Pillow.

The files are put together byte by byte. Within 1 of 255 is what a level's upper byte gives.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train_clip.data import crops
from train_clip.data.images import open_rgb, read_image
from train_clip.data_tools.npz import cache_image
from train_clip.errors import BadSample


def packed(levels: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Rows of (H, W) levels, each filled up to whole bytes, the first level in a byte's upper bits."""
    rows = []
    for row in levels.tolist():
        if bits in (16, 32):
            rows.append(b"".join(struct.pack(order + {16: "H", 32: "I"}[bits], level % 2**bits) for level in row))
        else:
            text = "".join(f"{level % 2**bits:0{bits}b}" for level in row)
            text += "0" * (-len(text) % 8)
            rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
    return b"".join(rows)


def white_of(levels: Any, bits: int) -> np.ndarray:
    """Levels in [0, 255], float."""
    return np.asarray(levels, dtype=float) * 255 / (2**bits - 1)


def shown(path: Path) -> np.ndarray:
    """(H, W, 3) float of what the package makes of a file."""
    return np.asarray(open_rgb(str(path))).astype(float)


# PNG (ISO 15948)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(levels: np.ndarray, bits: int, kind: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    """A PNG of (H, W, C) levels, of a colour type; the chunks stand before its pixels."""
    height, width = levels.shape[:2]
    content = b""
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = levels[top::down, left::right]
        if part.size:
            for row in part.reshape(len(part), -1):
                content += b"\0" + packed(row[None], bits)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def trns(*levels: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(levels)}H", *levels))


HIDDEN = {1: range(2), 2: range(4), 4: range(16), 8: (0, 1, 77, 255), 16: (0, 1, 0x0101, 0x1234, 0x3412, 0xFFFF)}
GRAY = {bits: np.resize(np.arange(2**bits), (9, 20, 1)) for bits in (1, 2, 4, 8)} | {
    16: np.resize([0, 1, 0x0100, 0x0101, 0x1234, 0x1235, 0x1334, 0x3412, 0x00FF, 0xFF00, 0xFFFF], (9, 20, 1))
}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", GRAY)
def test_gray_png_with_a_transparent_level(tmp_path: Path, bits: int, interlaced: bool) -> None:
    """Each depth, with no level hidden and with each of several: that one is white, all others are as they are."""
    for hidden in (None, *HIDDEN[bits]):
        chunks = [] if hidden is None else [trns(hidden)]
        (tmp_path / "a.png").write_bytes(png(GRAY[bits], bits, 0, *chunks, interlaced=interlaced))
        expected = np.where(GRAY[bits] == (-1 if hidden is None else hidden), 255, white_of(GRAY[bits], bits))
        assert np.abs(shown(tmp_path / "a.png") - expected).max() < 1, hidden
        mended = read_image(str(tmp_path / "a.png")).mended
        assert ("transparency composited on white" in mended) == (hidden is not None)


@pytest.mark.parametrize("bits", [2, 4])
def test_only_the_lower_bits_of_a_transparent_level_count(tmp_path: Path, bits: int) -> None:
    """ISO 15948, 11.3.2.1: of 16 bits those that a level has."""
    (tmp_path / "a.png").write_bytes(png(GRAY[bits], bits, 0, trns(0xFFFD)))
    expected = np.where(GRAY[bits] == 0xFFFD % 2**bits, 255, white_of(GRAY[bits], bits))
    assert np.abs(shown(tmp_path / "a.png") - expected).max() < 1


def neighbors(color: tuple[int, ...], bits: int) -> np.ndarray:
    """(9, 20, 3) colors: one, those that differ from it in one byte of one channel, and it with its bytes swapped."""
    steps = (1,) if bits == 8 else (1, 256)
    others = [tuple(c ^ step * (place == at) for at, c in enumerate(color)) for place in range(3) for step in steps]
    swapped = tuple((c & 255) << 8 | c >> 8 for c in color) if bits == 16 else (0, 0, 0)
    colors = [color, *others, swapped, (0, 0, 0), (2**bits - 1,) * 3]
    return np.resize(np.array(colors), (9, 20, 3))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_color_png_with_a_transparent_color(tmp_path: Path, bits: int, interlaced: bool) -> None:
    """That color alone is white: of 16 bits, not those that share its upper or its lower bytes."""
    for color in ((0x12, 0x34, 0x56), (0, 0, 0), (255, 255, 255)) if bits == 8 else (
        *((0x1234, 0x5678, 0x9ABC), (0, 0, 0), (0xFFFF, 0xFFFF, 0xFFFF), (0x0012, 0x0034, 0x0056)),
    ):  # fmt: skip
        levels = neighbors(color, bits)
        (tmp_path / "a.png").write_bytes(png(levels, bits, 2, trns(*color), interlaced=interlaced))
        hidden = (levels == color).all(axis=-1, keepdims=True)
        expected = np.where(hidden, 255, white_of(levels, bits))
        assert np.abs(shown(tmp_path / "a.png") - expected).max() < 1, color
        assert read_image(str(tmp_path / "a.png")).mended == ("transparency composited on white",)


@pytest.mark.parametrize(("kind", "channels"), [(4, 2), (6, 4)])
@pytest.mark.parametrize("bits", [8, 16])
def test_png_with_alpha(tmp_path: Path, kind: int, channels: int, bits: int) -> None:
    """Gray and colors with an alpha, against the formula."""
    levels = np.random.default_rng(0).integers(0, 2**bits, (9, 20, channels))
    (tmp_path / "a.png").write_bytes(png(levels, bits, kind))
    color, alpha = white_of(levels[..., :-1], bits), white_of(levels[..., -1:], bits) / 255
    assert np.abs(shown(tmp_path / "a.png") - (color * alpha + 255 * (1 - alpha))).max() < 2.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_with_alphas(tmp_path: Path, bits: int) -> None:
    """Each depth, alphas of fewer entries than there are."""
    palette = np.random.default_rng(0).integers(0, 256, (2**bits, 3))
    alphas = np.array([0, 128, 51][: 2**bits - 1] + [255] * (2**bits - min(3, 2**bits - 1)))
    given = bytes(alphas[:3].tolist())
    chunks = (chunk(b"PLTE", palette.astype(np.uint8).tobytes()), chunk(b"tRNS", given[: 2**bits - 1]))
    (tmp_path / "a.png").write_bytes(png(GRAY[bits], bits, 3, *chunks))
    alpha = alphas[GRAY[bits]] / 255
    assert np.abs(shown(tmp_path / "a.png") - (palette[GRAY[bits][..., 0]] * alpha + 255 * (1 - alpha))).max() < 1.5


# TIFF (6.0)

RAW, DEFLATE, PACKBITS = 1, 8, 32773
FORM = {1: "B", 2: "s", 3: "H", 4: "I"}


def tiff(
    levels: np.ndarray,
    bits: int,
    photometric: int | None = 1,
    order: str = "<",
    fill: int = 1,
    compression: int = RAW,
    planar: int = 1,
    sample_format: int = 1,
    extra: tuple[int, ...] = (),
    **more: tuple[int, ...],
) -> bytes:
    """A TIFF of (H, W, C) levels in one strip, or one a plane; ``more`` are tags of shorts, as ``t530``."""
    height, width, channels = levels.shape
    planes = [levels[..., place] for place in range(channels)] if planar == 2 else [levels.reshape(height, -1)]
    strips = []
    for plane in planes:
        content = packed(plane, bits, order)
        if compression == DEFLATE:
            content = zlib.compress(content)
        elif compression == PACKBITS:
            rows = np.frombuffer(content, np.uint8).reshape(height, -1)
            parts = [row[at : at + 128].tobytes() for row in rows for at in range(0, len(row), 128)]
            content = b"".join(bytes([len(part) - 1]) + part for part in parts)
        if fill == 2:
            content = bytes(int(f"{byte:08b}"[::-1], 2) for byte in content)
        strips.append(content + b"\0" * (len(content) % 2))
    starts = list(itertools.accumulate(map(len, strips), initial=8))
    tags: dict[int, tuple[int, list[int]]] = {
        **{256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * channels), 259: (3, [compression])},
        **({} if photometric is None else {262: (3, [photometric])}),
        **{266: (3, [fill]), 273: (4, starts[:-1]), 277: (3, [channels]), 278: (4, [height])},
        **{279: (4, [len(strip) for strip in strips]), 284: (3, [planar])},
        **({338: (3, list(extra))} if extra else {}),
        **{339: (3, [sample_format] * channels)},
        **{int(name[1:]): (3, list(values)) for name, values in more.items()},
    }
    beside, entries = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(values)}{FORM[kind]}", *values)
        if len(content) > 4:
            place = starts[-1] + len(beside)
            beside += content + b"\0" * (len(content) % 2)
            content = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    mark = {"<": b"II", ">": b"MM"}[order]
    return mark + struct.pack(f"{order}HI", 42, starts[-1] + len(beside)) + b"".join(strips) + beside + directory


def readable(bits: int, photometric: int | None, order: str, fill: int) -> bool:
    """Which gray ones Pillow opens; the others are refused."""
    if bits == 12:
        return (photometric, order, fill) == (1, "<", 1)
    if bits == 16:
        return (photometric, order, fill) in {(None, "<", 1), (0, "<", 1), (1, "<", 1), (1, "<", 2), (1, ">", 1)}
    return True


@pytest.mark.parametrize("compression", [RAW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("photometric", [None, 0, 1])
def test_gray_tiff(tmp_path: Path, photometric: int | None, bits: int, compression: int) -> None:
    """White is zero (the default) or black is, in both orders of bytes and bits, planar or not: right, or refused."""
    levels = GRAY.get(bits, np.resize([0, 1, 0x012, 0x234, 0x800, 0xF00, 0xFFF], (9, 20, 1)))
    expected = white_of(levels, bits) if photometric == 1 else 255 - white_of(levels, bits)
    for order, fill, planar in itertools.product("<>", (1, 2), (1, 2)):
        (tmp_path / "a.tif").write_bytes(tiff(levels, bits, photometric, order, fill, compression, planar))
        if readable(bits, photometric, order, fill):
            assert np.abs(shown(tmp_path / "a.tif") - expected).max() < 1.01, (order, fill, planar)
        else:
            with pytest.raises(BadSample, match="not an image that Pillow can read"):
                shown(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [RAW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("bits", [8, 16])
def test_color_tiff(tmp_path: Path, bits: int, planar: int, compression: int) -> None:
    """RGB and CMYK, and RGB with either kind of alpha, in both orders of bytes, in one plane or one a channel."""
    levels = np.random.default_rng(0).integers(0, 2**bits, (9, 20, 4))
    full = white_of(levels, bits)
    alpha = full[..., 3:] / 255
    premultiplied = np.concatenate([levels[..., :3] * levels[..., 3:] // (2**bits - 1), levels[..., 3:]], axis=-1)
    over = full[..., :3] * alpha + 255 * (1 - alpha)
    cases = {
        "RGB": (levels[..., :3], 2, (), full[..., :3]),
        "RGBA": (levels, 2, (2,), over),
        "RGBa": (premultiplied, 2, (1,), over),
        "CMYK": (levels, 5, (), (255 - full[..., :3]) * (255 - full[..., 3:]) / 255),
    }
    for (name, (stored, photometric, extra, expected)), order in itertools.product(cases.items(), "<>"):
        content = tiff(stored, bits, photometric, order, 1, compression, planar, extra=extra)
        (tmp_path / "a.tif").write_bytes(content)
        assert np.abs(shown(tmp_path / "a.tif") - expected).max() < 3, (name, order)


@pytest.mark.parametrize("compression", [RAW, DEFLATE])
def test_gray_tiff_with_alpha(tmp_path: Path, compression: int) -> None:
    """Not multiplied by it, and multiplied, on white; an extra channel that is no alpha is left out."""
    gray, alpha = np.mgrid[:256:8, :256:8]
    multiplied = gray * alpha // 255
    over = gray * alpha / 255 + 255 - alpha
    for extra, stored, expected in ((2, gray, over), (1, multiplied, multiplied + 255.0 - alpha), (0, gray, gray)):
        levels = np.stack([stored, alpha], axis=-1)
        (tmp_path / "a.tif").write_bytes(tiff(levels, 8, compression=compression, extra=(extra,)))
        assert np.abs(shown(tmp_path / "a.tif") - expected[..., None]).max() < 2.5, extra


@pytest.mark.parametrize("compression", [RAW, DEFLATE])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("bits", "signed"), [(8, True), (16, True), (32, True), (32, False)])
def test_gray_tiff_with_a_sign(tmp_path: Path, bits: int, signed: bool, order: str, compression: int) -> None:
    """Below zero there is no gray; from 0 on, levels of 16 bits are read, those of 8 with a sign refused."""
    up = np.resize([0, 1, 0x0100, 0x1234, 0x7F00, 0x7FFF] if bits > 8 else [0, 1, 100, 127], (9, 20, 1))
    for levels in (up, up - 1):
        content = tiff(levels, bits, order=order, compression=compression, sample_format=1 + signed)
        (tmp_path / "a.tif").write_bytes(content)
        if bits > 8 and levels.min() == 0 and (signed or order == "<"):
            assert np.abs(shown(tmp_path / "a.tif") - white_of(levels, 16)).max() < 1
        else:
            with pytest.raises(BadSample, match=r"unknown range|not an image that Pillow can read"):
                shown(tmp_path / "a.tif")


@pytest.mark.parametrize("order", "<>")
def test_uncompressed_ycbcr_tiff(tmp_path: Path, order: str) -> None:
    """Chroma for each pixel, and for each two by two (the default): luma and gray chroma, against the luma."""
    luma = np.random.default_rng(0).integers(0, 256, (8, 20))
    full = np.stack([luma, np.full_like(luma, 128), np.full_like(luma, 128)], axis=-1)
    content = tiff(full, 8, 6, order, t530=(1, 1))
    (tmp_path / "a.tif").write_bytes(content)
    assert np.abs(shown(tmp_path / "a.tif") - luma[..., None]).max() < 2
    blocks = luma.reshape(4, 2, 10, 2).swapaxes(1, 2).reshape(4, 10, 4)
    units = np.concatenate([blocks, np.full((4, 10, 2), 128)], axis=-1).astype(np.uint8).tobytes()
    shorter = tiff(full, 8, 6, order, t530=(2, 2))
    strip = shorter.index(bytes(full.astype(np.uint8).tobytes()))
    (tmp_path / "a.tif").write_bytes(shorter[:strip] + units.ljust(full.size, b"\0") + shorter[strip + full.size :])
    assert np.abs(shown(tmp_path / "a.tif") - luma[..., None]).max() < 2


# PSD


def psd(black: np.ndarray) -> bytes:
    """A bitmap of Photoshop's, (H, W) of 1 for black (Adobe's specification; ImageMagick's psd.c)."""
    height, width = black.shape
    return struct.pack(">4sH6xHIIHH14x", b"8BPS", 1, 1, height, width, 1, 0) + packed(black, 1)


def test_a_bitmap_of_photoshop(tmp_path: Path) -> None:
    """One is black."""
    black = np.resize([0, 1, 1, 0, 0], (9, 20))
    (tmp_path / "a.psd").write_bytes(psd(black))
    assert (shown(tmp_path / "a.psd") == 255 * (1 - black[..., None])).all()


# Every path that reads images

SIDE = 32
DEEP = np.resize(GRAY[16], (SIDE, SIDE, 1))
COLORS = np.resize(neighbors((0x1234, 0x5678, 0x9ABC), 16), (SIDE, SIDE, 3))
FEW = {bits: np.resize(GRAY[bits], (SIDE, SIDE, 1)) for bits in (1, 2, 4)}
FILES = {
    "white is zero, 16 bits": ("a.tif", tiff(DEEP, 16, 0), 255 - white_of(DEEP, 16)),
    "12 bits": ("a.tif", tiff(DEEP % 4096, 12), white_of(DEEP % 4096, 12)),
    "planes of 16 bits": ("a.tif", tiff(COLORS, 16, 2, planar=2), white_of(COLORS, 16)),
    "a level of 2 bits": ("a.png", png(FEW[2], 2, 0, trns(1)), np.where(FEW[2] == 1, 255, white_of(FEW[2], 2))),
    "a level of 4 bits": ("a.png", png(FEW[4], 4, 0, trns(9)), np.where(FEW[4] == 9, 255, white_of(FEW[4], 4))),
    "a level of 16 bits": ("a.png", png(DEEP, 16, 0, trns(0x1234)), np.where(DEEP == 0x1234, 255, white_of(DEEP, 16))),
    "a color of 16 bits": (
        "a.png",
        png(COLORS, 16, 2, trns(0x1234, 0x5678, 0x9ABC)),
        np.where((COLORS[0, 0] == COLORS).all(axis=-1, keepdims=True), 255, white_of(COLORS, 16)),
    ),
    "a bitmap of Photoshop's": ("a.psd", psd(FEW[1][..., 0]), 255 - white_of(FEW[1], 1)),
}


@pytest.mark.parametrize("what", FILES)
def test_every_path_has_the_same_pixels(tmp_path: Path, what: str) -> None:
    """Training, evaluation, ``data check``, ``data npz`` and its arrays, ``preprocess`` of a path and of a picture."""
    name, content, expected = FILES[what]
    path = tmp_path / "images" / name
    path.parent.mkdir()
    path.write_bytes(content)

    def window(picture: tuple[int, int]) -> crops.Window:
        return crops.random_crop(picture, SIDE, np.random.default_rng(0))

    preprocess = crops.Preprocess(SIDE, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    assert isinstance(cache_image(tmp_path, SIDE, f"images/{name}"), dict)
    (array,) = tmp_path.rglob("*.npz")
    with Image.open(path) as opened:
        found = {
            "training": crops.read_square(str(path), SIDE, window),
            "evaluation": crops.read_square(str(path), SIDE),
            "data check": crops.to_tensor(crops.read_picture(str(path)).picture),
            "npz, training": crops.read_square(str(array), SIDE, window),
            "npz": crops.read_square(str(array), SIDE),
            "preprocess": preprocess(str(path)) * 255,
            "preprocess of a picture": preprocess(opened) * 255,
        }
    for way, pixels in found.items():
        shape = (3, SIDE, SIDE)
        assert np.abs(pixels.numpy().astype(float) - np.broadcast_to(expected.transpose(2, 0, 1), shape)).max() < 1, way
