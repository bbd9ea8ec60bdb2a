"""``Preprocess`` against OpenAI's pipeline: restated with Pillow and NumPy, and torchvision's own where installed.

openai/CLIP's _transform: Resize(S, BICUBIC), CenterCrop(S), RGB, ToTensor, Normalize. All is compared to the bit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from train_clip.data.crops import Preprocess
from train_clip.errors import BadSample
from train_clip.models.config import MEAN, STD

PHOTOS = Path("/work/shared/data/photos")
SIZES = (32, 33)
ORIENTATION = 0x0112
# Larger and smaller than the squares, square and not, with 0 to 8 pixels over of which odd halves are rounded.
SHAPES = [
    (32, 32), (33, 33), (31, 31), (2, 2), (5, 9), (9, 5), (2, 7), (40, 40), (101, 99), (99, 101), (333, 500),
    (640, 480), (200, 33), (33, 200), (3, 290), (290, 3), (1000, 32), *((64, 64 + over) for over in range(9)),
    *((33 + over, 33) for over in range(9)),
]  # fmt: skip


def preprocess(size: int) -> Preprocess:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return Preprocess(size, mean, std)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """Gradients, whose bicubic overshoot at the edges has to be clipped alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = (x, 1 - y, (x > 0.5) != (y > 0.3))
    return Image.fromarray((255 * np.stack(channels, -1)).round().astype(np.uint8))


def restated(picture: Image.Image, size: int) -> np.ndarray:
    """The five steps as torchvision does them on a picture, in Python's and NumPy's arithmetic."""
    width, height = picture.size
    # Resize: the shorter side to S, the longer one by truncation; nothing where it has the size already.
    shorter, longer = min(width, height), max(width, height)
    new = {shorter: size, longer: int(size * longer / shorter)}
    target = (size, new[longer]) if width <= height else (new[longer], size)
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.BICUBIC)
    # CenterCrop: half of what is over, rounded half to even.
    left, top = (round((side - size) / 2.0) for side in picture.size)
    picture = picture.crop((left, top, left + size, top + size)).convert("RGB")
    # ToTensor and Normalize: one rounding to float32 a step.
    pixels = np.asarray(picture).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def assert_same(found: Tensor, expected: np.ndarray, what: object = "") -> None:
    assert found.dtype == torch.float32, what
    assert np.array_equal(found.numpy(), expected), what


@pytest.mark.parametrize("make", [noise, smooth])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", SIZES)
def test_generated_pictures(size, mode, make):
    """Colour, grey and inks of 35 shapes, larger and smaller than S: the restatement to the bit.

    Grey becomes RGB before it is resized here and after it there, which is the same; of inks it is not, and RELIABILITY
    wants them mended, so what is restated is the picture made RGB.
    """
    prepare = preprocess(size)
    for width, height in SHAPES:
        picture = make(width, height).convert(mode)
        source = picture.convert("RGB") if mode == "CMYK" else picture
        assert_same(prepare(picture), restated(source, size), (mode, width, height))


@pytest.mark.parametrize("mode", ["P", "1"])
def test_palettes_and_black_and_white(mode):
    """Made RGB before they are resized: Pillow resizes them by the nearest pixel, and OpenAI's pipeline lets it."""
    differ = False
    for width, height in SHAPES:
        picture = noise(width, height).convert(mode)
        found = preprocess(32)(picture)
        assert_same(found, restated(picture.convert("RGB"), 32), (width, height))
        differ |= not np.array_equal(found.numpy(), restated(picture, 32))
    assert differ


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with a transparent colour"])
def test_transparency_is_laid_on_white(mode):
    """Pillow's alpha_composite on white, then the restatement."""
    picture = noise(50, 41).convert("RGBA")
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (41, 50), dtype=np.uint8))
    picture.putalpha(alpha)
    if mode == "LA":
        picture = picture.convert("LA")
    elif mode != "RGBA":
        picture = picture.convert("RGB").convert("P")
        picture.info["transparency"] = 3
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    expected = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    assert_same(preprocess(32)(picture), restated(expected, 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, tmp_path):
    """Each of the eight orientations, opened and as a path: Pillow's exif_transpose, then the restatement."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "photo.jpg"
    smooth(61, 40).save(path, exif=exif, quality=95)
    with Image.open(path) as opened:
        expected = restated(ImageOps.exif_transpose(opened), 32)
        assert_same(preprocess(32)(opened), expected)
    assert_same(preprocess(32)(path), expected)
    assert_same(preprocess(32)(str(path)), expected)


def test_sixteen_bits_of_grey_are_scaled():
    """Their upper eight bits; Pillow's own conversion would give white."""
    grey = np.random.default_rng(0).integers(0, 2**16, (37, 45), dtype=np.uint16)
    expected = restated(Image.fromarray((grey >> 8).astype(np.uint8)), 32)
    assert_same(preprocess(32)(Image.fromarray(grey)), expected)


def test_floats_are_refused():
    """Pixels whose range nobody knows: BadSample, no guess."""
    with pytest.raises(BadSample):
        preprocess(32)(Image.fromarray(np.ones((9, 9), dtype=np.float32)))


def test_the_picture_that_is_given_stays_as_it_is():
    """Neither its size, its mode nor its pixels change, also where nothing has to be done to it."""
    for picture in (noise(32, 32), noise(60, 40).convert("P"), noise(60, 40).convert("RGBA")):
        before = (picture.size, picture.mode, picture.tobytes())
        preprocess(32)(picture)
        assert (picture.size, picture.mode, picture.tobytes()) == before


def test_means_and_deviations_of_ones_own():
    """Other colours than CLIP's, against NumPy's float32."""
    mean, std = (0.1, 0.5, 0.9), (0.3, 0.2, 0.7)
    found = Preprocess(32, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))(noise(32, 32))
    pixels = np.asarray(noise(32, 32)).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    wide = [np.array(values, dtype=np.float32)[:, None, None] for values in (mean, std)]
    assert_same(found, (pixels - wide[0]) / wide[1])


def torchvision_pipeline(size: int):
    """OpenAI's _transform, of torchvision's own parts."""
    transforms = pytest.importorskip("torchvision.transforms")
    return transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            lambda picture: picture.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


@pytest.mark.parametrize("size", SIZES)
def test_the_restatement_is_torchvisions(size):
    """The restatement above against the real transforms, in every mode and shape: what the other tests rest on."""
    pipeline = torchvision_pipeline(size)
    for mode in ("RGB", "L", "CMYK", "P", "1"):
        for width, height in SHAPES:
            picture = noise(width, height).convert(mode)
            assert_same(pipeline(picture), restated(picture, size), (mode, width, height))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here")
@pytest.mark.parametrize("size", [224, 336])
def test_photographs_against_torchvision(size):
    """200 photographs, seven of them grey, to the bit: but the one that its EXIF turns, which is theirs once turned."""
    pipeline, prepare = torchvision_pipeline(size), preprocess(size)
    different = []
    paths = sorted(PHOTOS.glob("*.JPEG"))
    for path in paths:
        with Image.open(path) as picture:
            found = prepare(path)
            assert torch.equal(found, prepare(picture)), path.name
            if not torch.equal(found, pipeline(picture)):
                different.append(path.name)
                assert torch.equal(found, pipeline(ImageOps.exif_transpose(picture))), path.name
    assert len(paths) == 200
    assert different == ["n02951585_can_opener.JPEG"]


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here")
def test_photographs_against_the_restatement():
    """The same photographs without torchvision, at one size."""
    prepare = preprocess(224)
    for path in sorted(PHOTOS.glob("*.JPEG")):
        with Image.open(path) as picture:
            assert_same(prepare(path), restated(ImageOps.exif_transpose(picture), 224), path.name)
