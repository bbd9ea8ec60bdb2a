"""Training crops of JPEGs: Pillow's pixels at each scale, its word on what is damaged, and how far reduced ones are."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from train_clip.data import images
from train_clip.data.crops import Window, cut, random_crop, random_resized_crop, read_square
from train_clip.data.images import open_rgb
from train_clip.errors import BadSample

ORIENTATION = 0x0112  # the tag's number in Exif 2.32, section 4.6.4
PILLOWS = 3  # of 255: how far PyTorch's bicubic is from Pillow's (test_windows.py)


def photo_like(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as in photographs (Field 1987), each colour its own."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1 / max(width, height))
    levels = np.fft.ifft2(spectrum).real
    spread = levels.std(axis=(1, 2), keepdims=True)
    return Image.fromarray(np.clip(levels / spread * 50 + 128, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def gradient(width: int, height: int) -> Image.Image:
    """Red rises to the right, green downwards; blue says nothing."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(10, 245, width)
    pixels[..., 1] = np.linspace(10, 245, height)[:, None]
    pixels[..., 2] = 128
    return Image.fromarray(pixels)


def saved(path: Path, picture: Image.Image, **how: Any) -> str:
    picture.save(path, how.pop("format", "JPEG"), **{"quality": 92} | how)
    return str(path)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def paper(size: int, seed: int = 0) -> Callable[[tuple[int, int]], Window]:
    return partial(random_crop, size=size, rng=np.random.default_rng(seed))


def square(size: int, seed: int = 0) -> Callable[[tuple[int, int]], Window]:
    return partial(random_resized_crop, size=size, rng=np.random.default_rng(seed), min_share=0.5)


def whole(path: str, draw: Callable[[tuple[int, int]], Window]) -> Tensor:
    """The crop out of Pillow's full decode."""
    picture = open_rgb(path)
    return cut(np.array(picture).transpose(2, 0, 1), draw(picture.size))


VARIANTS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "RGB within": {"keep_rgb": True},
    "restarts": {"restart_marker_rows": 1},
    "MPO": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (9, 9))]},
}


@pytest.fixture
def never_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are decoded without Pillow, or the test fails."""
    open_image = images.open_image

    def plain(path: str) -> images.Jpeg:
        image = open_image(path)
        assert isinstance(image, images.Jpeg)
        return image

    monkeypatch.setattr(images, "open_image", plain)
    monkeypatch.setattr(images, "open_rgb", mock.Mock(side_effect=AssertionError("left to Pillow")))


@pytest.mark.parametrize("name", [*VARIANTS, "grey"])
@pytest.mark.parametrize("size", [130, 64, 32, 16])
def test_pixels_are_pillows_at_each_scale(tmp_path: Path, never_pillow: None, name: str, size: int) -> None:
    """At 1, 1/2, 1/4 and 1/8, against Pillow's own reduced decoding (draft), box, resize and crop: to within 3."""
    picture = photo_like(200, 131).convert("L" if name == "grey" else "RGB")
    path = saved(tmp_path / "a.jpg", picture, **VARIANTS.get(name, {}))
    for seed in range(5):
        draw, again = (partial(random_crop, size=size, rng=np.random.default_rng(seed)) for _ in range(2))
        window, found = again((200, 131)), read_square(path, 0, draw)
        reduction = {130: 1, 64: 2, 32: 4, 16: 8}[size]
        with Image.open(path) as reference:
            reference.draft(None, (200 // reduction, 131 // reduction))
            small = reference.convert("RGB")
        assert small.size == (-(-200 // reduction), -(-131 // reduction))
        small = small.crop((0, 0, round(200 / reduction), round(131 / reduction)))
        left, top = window.place
        expected = small.resize(window.target, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        difference = found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= PILLOWS
        assert np.abs(difference).mean() < 0.05


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("draw", [paper, square])
def test_a_full_decode_is_pillows_to_the_bit(tmp_path: Path, never_pillow: None, name: str, draw: Any) -> None:
    """Where the crop needs all pixels: the crop out of Pillow's decode, byte for byte."""
    path = saved(tmp_path / "a.jpg", photo_like(200, 131), **VARIANTS[name])
    found = read_square(path, 0, draw(100))
    assert torch.equal(found, whole(path, draw(100)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("draw", [paper, square])
@pytest.mark.parametrize("size", [100, 40, 10])
def test_windows_lie_in_the_upright_picture(
    tmp_path: Path, never_pillow: None, orientation: int, draw: Any, size: int
) -> None:
    """All eight orientations at full, half and eighth size: colours that say where they are, against a full decode."""
    path = saved(tmp_path / "a.jpg", gradient(203, 131), exif=turned(orientation), subsampling=0)
    for seed in range(5):
        found, expected = read_square(path, 0, draw(size, seed)), whole(path, draw(size, seed))
        difference = (found.int() - expected.int()).abs().numpy()
        # A pixel of the crop is 235 / size levels at the most; both edges are within half a one.
        assert difference.max() <= (0 if size == 100 else 3 + 245 / size)
        assert np.median(difference) <= (0 if size == 100 else 1 + 123 / size)


@pytest.mark.parametrize("size", [400, 200, 100, 50])
def test_how_far_reduced_crops_are(tmp_path: Path, size: int) -> None:
    """Pictures of 640×480 at full size, half, quarter and eighth, against the full decode: equal, or so close."""
    for seed in range(4):
        for picture, draw, mean, most in (
            (photo_like(640, 480, seed), paper, 5, 40),
            # Half a pixel of the crop aside, as no window is of whole pixels of each scale.
            (photo_like(640, 480, seed), square, 13, 90),
            (gradient(640, 480), paper, 0.5, 6),
            (gradient(640, 480), square, 123 / size, 6 + 123 / size),
        ):
            path = saved(tmp_path / "a.jpg", picture)
            difference = (read_square(path, 0, draw(size, seed)).int() - whole(path, draw(size, seed)).int()).abs()
            assert difference.float().mean() <= (0 if size == 400 else mean)
            assert difference.max() <= (0 if size == 400 else most)


def test_no_more_is_decoded_than_is_needed(tmp_path: Path) -> None:
    """What the decoder gives, by the size of the crop: the least of four scales that need not be enlarged."""
    path = saved(tmp_path / "a.jpg", photo_like(640, 480))
    for size, expected in ((480, 480), (241, 480), (240, 240), (121, 240), (120, 120), (60, 60), (10, 60)):
        with mock.patch.object(simplejpeg, "decode_jpeg", side_effect=simplejpeg.decode_jpeg) as decode:
            read_square(path, 0, paper(size))
        assert decode.call_args.kwargs == {"min_height": expected, "min_width": expected * 4 // 3}


def damaged(content: bytes) -> bytes:
    """Zeros in the middle of the scan: libjpeg warns, and Pillow does not ask."""
    middle = len(content) * 2 // 3
    return content[:middle] + bytes(40) + content[middle + 40 :]


@pytest.mark.parametrize("size", [100, 20])
def test_what_libjpeg_warns_of_is_left_to_pillow(tmp_path: Path, size: int) -> None:
    """A damaged scan that Pillow reads: its pixels, at whatever scale, so that it is the same picture everywhere."""
    path = Path(saved(tmp_path / "a.jpg", photo_like(200, 131)))
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(path.read_bytes())
    assert torch.equal(read_square(str(path), 0, paper(size)), whole(str(path), paper(size)))


def files(folder: Path) -> dict[str, bytes]:
    """JPEGs for which there is no short way, and others that are no picture."""
    folder.mkdir()
    sound = Path(saved(folder / "sound.jpg", photo_like(200, 131))).read_bytes()
    inks = Path(saved(folder / "inks.jpg", photo_like(200, 131).convert("CMYK"))).read_bytes()
    ycck = bytearray(inks)
    ycck[ycck.index(b"Adobe") + 11] = 2  # T.872, 6.5.3
    lossless = io.BytesIO()
    photo_like(200, 131).save(lossless, "PNG")
    start = sound.index(b"\xff\xda")
    return {
        "CMYK": inks,
        "YCCK": bytes(ycck),
        "PNG called .jpg": lossless.getvalue(),
        "without its end": sound[:-2],
        "cut": sound[: len(sound) // 2],
        "cut in the header": sound[:300],
        "100 scans": sound[:start] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 101,
        "12 bits": sound.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "empty": b"",
        "a page": b"<html>",
        "one row": Path(saved(folder / "row.jpg", Image.new("RGB", (50, 1)))).read_bytes(),
        "a strip": Path(saved(folder / "strip.jpg", Image.new("RGB", (404, 4)))).read_bytes(),
        "too many pixels": sound.replace(b"\x00\x83\x00\xc8", b"\xff\x00\xff\x00"),
    }


def test_what_is_no_plain_jpeg(tmp_path: Path) -> None:
    """Other kinds and bad files: the crop out of ``open_rgb``, or its reason and path, in the same words."""
    reasons = {}
    for name, content in files(tmp_path / "made").items():
        path = tmp_path / "a.jpg"
        path.write_bytes(content)
        try:
            expected = whole(str(path), paper(20))
        except BadSample as bad:
            with pytest.raises(BadSample) as caught:
                read_square(str(path), 0, paper(20))
            assert (caught.value.path, caught.value.reason) == (bad.path, bad.reason)
            reasons[name] = bad.reason
        else:
            assert torch.equal(read_square(str(path), 0, paper(20)), expected), name
    assert reasons.keys() >= {"cut", "cut in the header", "100 scans", "empty", "a page", "one row", "a strip"}
    assert not reasons.keys() & {"CMYK", "YCCK", "PNG called .jpg"}
    assert reasons["too many pixels"] == "over 89,478,485 pixels"


def test_a_file_that_changes_size_within_is_left_to_pillow(tmp_path: Path) -> None:
    """Where the decoder's shape is not that of the header, nothing is cut out of it."""
    path = saved(tmp_path / "a.jpg", photo_like(200, 131))
    other = np.zeros((20, 20, 3), dtype=np.uint8)
    with mock.patch.object(simplejpeg, "decode_jpeg", return_value=other):
        assert torch.equal(read_square(path, 0, paper(100)), whole(path, paper(100)))


def test_the_window_is_drawn_once(tmp_path: Path) -> None:
    """By whichever way a file is decoded: the generator is left in the same state."""
    plain = saved(tmp_path / "a.jpg", photo_like(200, 131))
    bad = Path(saved(tmp_path / "b.jpg", photo_like(200, 131)))
    bad.write_bytes(damaged(bad.read_bytes()))
    lossless = saved(tmp_path / "c.png", photo_like(200, 131), format="PNG")
    states = set()
    for path in (plain, str(bad), lossless):
        rng = np.random.default_rng(0)
        read_square(path, 0, partial(random_resized_crop, size=20, rng=rng, min_share=0.5))
        states.add(str(rng.bit_generator.state))
    assert len(states) == 1
