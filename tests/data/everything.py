"""A folder with one of everything that RELIABILITY lists: what is mended, what is skipped, and what stops a run."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

LONG = " ".join(["word"] * 90)  # 90 tokens, 15 over the 75 that there is room for


@dataclass
class Everything:
    """What was written, and what has to be said of it.

    Args:
        folder: where.
        clean: names of the images whose pairs can be used, and their captions.
        bad: image or caption that cannot be used → why.
        mended: what is mended → the names of the images of those pairs.
    """

    folder: Path
    clean: dict[str, list[str]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    mended: dict[str, list[str]] = field(default_factory=dict)

    def image(self, name: str, content: bytes | Image.Image, *mended: str, bad: str = "", **how: Any) -> None:
        """Write an image, and a caption of its own beside it."""
        self.pair(name, content, f"caption of {name}\n".encode(), *mended, bad_image=bad, **how)

    def pair(
        self,
        name: str,
        content: bytes | Image.Image,
        caption: bytes,
        *mended: str,
        bad_image: str = "",
        bad_caption: str = "",
        **how: Any,
    ) -> None:
        """Write an image and its caption, and note what is to be found."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content, how.pop("kind", "JPEG"), **how))
        path.with_suffix(".txt").write_bytes(caption)
        if bad_image:
            self.bad[name] = bad_image
        if bad_caption:
            self.bad[str(Path(name).with_suffix(".txt"))] = bad_caption
        if not bad_image and not bad_caption:
            lines = caption.decode("utf-8-sig").split("\n")
            self.clean[name] = [line.strip() for line in lines if line.strip()]
        for what in mended:
            self.mended.setdefault(what, []).append(name)


def encoded(picture: Image.Image, kind: str, **how: Any) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **how)
    return stream.getvalue()


def drawing(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture that looks like no other: perceptual hashes of noise of this size differ in about 32 bits."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = small.resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(picture).rectangle((0, 0, 3, 3), fill=(number, number, number))
    return picture


def write_everything(folder: Path, faults: bool = False) -> Everything:
    """Write the folder.

    Args:
        folder: to be made.
        faults: whether what no run can begin with is there too.
    """
    folder.mkdir(parents=True)
    all_of_it = Everything(folder)
    for write in (_plain, _mended_images, _mended_captions, _bad_images, _bad_captions):
        write(all_of_it)
    (folder / "lone_image.jpg").write_bytes(encoded(drawing(90), "JPEG"))
    (folder / "lone_caption.txt").write_text("nothing to see\n", encoding="utf-8")
    (folder / "notes.json").write_text("{}", encoding="utf-8")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    (folder / ".hidden.jpg").write_bytes(b"")
    if faults:
        _faults(folder)
    return all_of_it


def _plain(to: Everything) -> None:
    """Names: what a listing by ``*.jpg`` would miss, and what a careless stem would mix up."""
    to.image("plain.jpg", drawing(1))
    to.image("UPPER.JPG", drawing(2))
    to.image("camel.Jpeg", drawing(3))
    to.image("modern.webp", drawing(4), kind="WEBP", lossless=True)
    to.image("dots.a.b.jpg", drawing(5))
    to.image("dots.a.c.jpg", drawing(6))
    to.image("one/same.jpg", drawing(7))
    to.image("two/same.jpg", drawing(8))
    apart = unicodedata.normalize("NFD", "bär.jpg")
    to.image(apart, drawing(9))
    (to.folder / apart).with_suffix(".txt").rename(to.folder / unicodedata.normalize("NFC", "bär.txt"))
    to.pair("separator.jpg", drawing(10), "one\u2028caption\n".encode())
    to.pair("long.jpg", drawing(11), LONG.encode())


def _mended_images(to: Everything) -> None:
    inks = "CMYK or YCCK to RGB"
    to.image("cmyk.jpg", drawing(20).convert("CMYK"), inks)
    ycck = bytearray(encoded(drawing(21).convert("CMYK"), "JPEG"))
    ycck[ycck.index(b"Adobe") + 11] = 2
    to.image("ycck.jpg", bytes(ycck), inks)
    levels = np.asarray(drawing(22).convert("L")).astype(np.uint16) * 257
    to.image("grey16.png", Image.fromarray(levels), "16-bit grayscale scaled to 8 bits", kind="PNG")
    palette = drawing(23).quantize(16)
    to.image("palette.png", palette, "palette to RGB", kind="PNG")
    white = "transparency composited on white"
    to.image("palette_hidden.png", drawing(24).quantize(16), white, kind="PNG", transparency=3)
    glass = drawing(25).convert("RGBA")
    glass.putalpha(128)
    to.image("rgba.png", glass, white, kind="PNG")
    to.image("la.png", drawing(26).convert("LA"), white, kind="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # Exif 2.32, section 4.6.4: row 0 is on the right
    to.image("turned.jpg", drawing(27), "rotated upright by EXIF", exif=exif)
    to.image("exif.png", drawing(28), "unreadable EXIF ignored", kind="PNG", exif=b"Exif\0\0no such thing")
    frames = "first of several frames"
    several = {"save_all": True, "append_images": [drawing(60)]}
    to.image("animated.gif", drawing(29), frames, "palette to RGB", kind="GIF", **several)
    to.image("moving.webp", drawing(30), frames, kind="WEBP", **several)
    to.image("several.mpo", drawing(31), frames, kind="MPO", **several)
    to.image("jpeg.png", drawing(32), "suffix of another format")


def _mended_captions(to: Everything) -> None:
    to.pair("bom.jpg", drawing(40), b"\xef\xbb\xbfwith a mark\n", "byte order mark dropped")
    to.pair("crlf.jpg", drawing(41), b"two\r\nlines\r\n", "CR LF line endings")


def _bad_images(to: Everything) -> None:
    damaged, no_image = "damaged image (OSError)", "not an image that Pillow can read"
    jpeg, png = encoded(drawing(50, 200, 150), "JPEG"), encoded(drawing(51, 200, 150), "PNG")
    to.image("truncated.jpg", jpeg[: len(jpeg) // 2], bad=damaged)
    to.image("cut.png", png[: len(png) // 2], bad=damaged)
    flipped = bytearray(png)
    flipped[flipped.index(b"IDAT") + 200] ^= 1
    to.image("crc.png", bytes(flipped), bad=damaged)
    to.image("empty.jpg", b"", bad="empty file")
    to.image("html.jpg", b"<!DOCTYPE html><title>404</title>", bad="not an image but an HTML page")
    to.image("svg.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', bad="not an image but an SVG drawing")
    to.image("text.jpg", b"no picture", bad=no_image)
    to.image("heic.jpg", b"\0\0\0\x18ftypheic" + bytes(20), bad="HEIF image or video, which Pillow does not read")
    shades = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    unknown = "floating-point pixels of unknown range"
    to.image("float.tif", Image.fromarray(shades), bad=unknown, kind="TIFF")
    to.image("bomb.png", claimed_png(9_460), bad="over 89,478,485 pixels")
    absurd = "a side below 2 pixels or an aspect ratio above 100"
    to.image("dot.png", Image.new("RGB", (1, 1)), bad=absurd, kind="PNG")
    to.image("line.png", Image.new("RGB", (10_000, 1)), bad=absurd, kind="PNG")


def _bad_captions(to: Everything) -> None:
    for number, (name, caption, why) in enumerate(
        (
            ("latin1", "ein Bär\n".encode("latin-1"), "caption is not UTF-8"),
            ("utf16", "a bear\n".encode("utf-16"), "caption is UTF-16, not UTF-8"),
            ("nul", b"a\0bear\n", "caption contains NUL"),
            ("blank", b" \n\t\n", "caption is empty"),
            ("void", b"", "caption is empty"),
        )
    ):
        to.pair(f"{name}.jpg", drawing(70 + number), caption, bad_caption=why)


def _faults(folder: Path) -> None:
    (folder / "twice").mkdir()
    for name in ("cat.jpg", "cat.png"):
        (folder / "twice" / name).write_bytes(encoded(drawing(80), "PNG"))
    (folder / "twice" / "cat.txt").write_text("which?\n", encoding="utf-8")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "above").symlink_to("..", target_is_directory=True)


def claimed_png(side: int) -> bytes:
    """A PNG whose header claims a square of a size that its few bytes do not hold."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
