"""Crops: bit for bit against torchvision's arithmetic restated, and by where on a ramp of pixels they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from train_clip.data.transforms import center_crop, random_crop, random_resized_crop, to_tensor

Noise = Callable[..., Image.Image]


def torchvision_resize(picture: Image.Image, size: int) -> Image.Image:
    """``Resize(size, BICUBIC)`` of torchvision 0.2x on a PIL image: _compute_resized_image_output_size and resize."""
    width, height = picture.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    return picture.resize((new_width, new_height), Image.Resampling.BICUBIC)


def torchvision_center_crop(picture: Image.Image, size: int) -> Image.Image:
    """``CenterCrop(size)`` of torchvision 0.2x on a PIL image no smaller than that."""
    width, height = picture.size
    crop_top = int(round((height - size) / 2.0))  # noqa: RUF046, as it stands there
    crop_left = int(round((width - size) / 2.0))  # noqa: RUF046
    return picture.crop((crop_left, crop_top, crop_left + size, crop_top + size))


SIZES = [(640, 480), (481, 641), (33, 33), (31, 77), (101, 40), (17, 1000), (225, 224), (224, 227), (7, 5), (2, 3)]


@pytest.mark.parametrize("size", [32, 33, 48, 224])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_center_crop_is_torchvisions(noise: Noise, shape: tuple[int, int], size: int) -> None:
    """Enlarged and reduced, wide and tall, odd and even: every byte of Resize and CenterCrop, restated above."""
    picture = noise(*shape)
    expected = torchvision_center_crop(torchvision_resize(picture, size), size)
    found = center_crop(picture, size)
    assert found.size == (size, size)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("excess", "start"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (9, 4)])
def test_center_crop_rounds_halves_to_even(noise: Noise, excess: int, start: int) -> None:
    """A longer side of S + 1, S + 3, … and no resize: the first row by hand, ½ → 0, 1½ → 2, 2½ → 2, 3½ → 4, 4½ → 4."""
    tall = np.asarray(noise(32, 32 + excess))
    assert (np.asarray(center_crop(Image.fromarray(tall), 32)) == tall[start : start + 32]).all()
    wide = np.ascontiguousarray(tall.swapaxes(0, 1))
    assert (np.asarray(center_crop(Image.fromarray(wide), 32)) == wide[:, start : start + 32]).all()


@pytest.mark.parametrize("shape", [(32, 37), (37, 32), (32, 32)])
def test_random_crop_is_a_window_and_every_window_occurs_as_often(noise: Noise, shape: tuple[int, int]) -> None:
    """No resize: 600 crops, each found in the picture; each of 6 offsets (1 where square) 100 times, ±5 deviations."""
    picture = noise(*shape)
    stored = np.asarray(picture)
    windows = {
        stored[top : top + 32, left : left + 32].tobytes(): (left, top)
        for top in range(stored.shape[0] - 31)
        for left in range(stored.shape[1] - 31)
    }
    rng = np.random.default_rng(0)
    counts = Counter(windows[random_crop(picture, 32, rng).tobytes()] for _ in range(600))
    assert set(counts) == set(windows.values())
    expected = 600 / len(windows)
    assert all(abs(count - expected) <= 5 * np.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("shape", [(60, 40), (41, 90), (10, 13)])
def test_random_crop_keeps_the_whole_shorter_side(noise: Noise, shape: tuple[int, int]) -> None:
    """Resized first: every crop is a window of torchvision's Resize, and all windows occur."""
    picture = noise(*shape)
    resized = np.asarray(torchvision_resize(picture, 24))
    height, width = resized.shape[:2]
    windows = {
        resized[top : top + 24, left : left + 24].tobytes() for top in range(height - 23) for left in range(width - 23)
    }
    rng = np.random.default_rng(0)
    assert {random_crop(picture, 24, rng).tobytes() for _ in range(400)} == windows


def ramp(width: int, height: int) -> Image.Image:
    """Red says the column, green the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def window(cropped: Image.Image) -> tuple[float, float, float, float]:
    """Left, top, width and height of a crop of a ramp, to about a pixel.

    Pixel j of S shows the place left + (j + ½) · side / S - ½. A tenth at each edge is left out: there bicubic weights
    are cut off by the picture's edge.
    """
    size = cropped.width
    inner = np.arange(size // 10, size - size // 10)
    values = np.asarray(cropped).astype(float)
    found = []
    for channel, axis in ((0, 0), (1, 1)):
        line = values[..., channel].mean(axis=axis)[inner]
        slope, start = np.polyfit(inner + 0.5, line + 0.5, 1)
        found.append((start, slope * size))
    (left, width), (top, height) = found
    return left, top, width, height


@pytest.mark.parametrize("min_share", [0.1, 0.5, 0.9])
def test_random_resized_crop_keeps_its_share(min_share: float) -> None:
    """A square picture: square windows inside it, their shares of the area within the bounds, uniform in quarters."""
    picture = ramp(200, 200)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        left, top, width, height = window(random_resized_crop(picture, 64, rng, min_share))
        assert width == pytest.approx(height, abs=0.5)
        assert min(left, top) > -1
        assert max(left + width, top + height) < 201
        shares.append(width * height / 200**2)
    # The side is a whole number of pixels: half a pixel of 200 is half a hundredth of the area.
    assert min(shares) > min_share - 0.01
    assert max(shares) < 1.01
    counts, _ = np.histogram(np.clip(shares, min_share, 1), bins=4, range=(min_share, 1))
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.75)).all()


def test_random_resized_crop_lies_anywhere() -> None:
    """Squares in a picture twice as wide as high: places over their whole range both ways, evenly in quarters."""
    picture = ramp(240, 120)
    rng = np.random.default_rng(0)
    places = []
    for _ in range(400):
        left, top, width, height = window(random_resized_crop(picture, 32, rng, 0.2))
        places.append((left / (240 - width), top / max(1, 120 - height)))
    for axis in (0, 1):
        counts, _ = np.histogram(np.clip([place[axis] for place in places], 0, 1), bins=4, range=(0, 1))
        assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.75)).all()


def torchvision_side(area: np.ndarray) -> np.ndarray:
    """Side of ``RandomResizedCrop.get_params`` of torchvision 0.2x for ratio=(1, 1), from the area that it drew."""
    aspect_ratio = 1.0
    return np.round(np.sqrt(area * aspect_ratio)).astype(int)


@pytest.mark.parametrize("shape", [(9, 9), (14, 9), (9, 12)])
def test_random_resized_crop_is_a_window_of_the_law(noise: Noise, shape: tuple[int, int]) -> None:
    """8,000 crops, cut and then resized: each a window, byte for byte, as often as torchvision's law says, ±5 sigma."""
    # Areas are shares of the largest square: on a square picture that is torchvision's law, elsewhere there is room for
    # each of them and no need of its fallback, the centre.
    picture, (width, height) = noise(*shape), shape
    places = {
        side: [(left, top) for left in range(width - side + 1) for top in range(height - side + 1)]
        for side in range(1, min(shape) + 1)
    }
    windows = {
        picture.crop((left, top, left + side, top + side)).resize((8, 8), Image.Resampling.BICUBIC).tobytes(): (
            side,
            left,
            top,
        )
        for side in range(4, min(shape) + 1)
        for left, top in places[side]
    }
    areas = np.linspace(0.25, 1, 100_001) * min(shape) ** 2
    share_of_side = Counter(torchvision_side(areas).tolist())
    rng = np.random.default_rng(0)
    counts = Counter(windows[random_resized_crop(picture, 8, rng, 0.25).tobytes()] for _ in range(8000))
    for side in range(5, 10):
        expected = 8000 * share_of_side[side] / len(areas) / len(places[side])
        for left, top in places[side]:
            assert abs(counts[side, left, top] - expected) <= 5 * np.sqrt(expected), (side, left, top)
    assert sum(counts[window] for window in counts if window[0] == 4) <= 1


@pytest.mark.parametrize("shape", [(240, 60), (60, 241), (60, 60)])
def test_random_resized_crop_of_the_largest_square_lies_anywhere(shape: tuple[int, int]) -> None:
    """A least share of 1: the whole shorter side, whatever the aspect, and along the longer one from end to end."""
    rng = np.random.default_rng(0)
    places = []
    for _ in range(200):
        left, top, width, height = window(random_resized_crop(ramp(*shape), 30, rng, 1.0))
        assert (width, height) == pytest.approx((60, 60), abs=0.7)
        assert min(left, top) == pytest.approx(0, abs=0.7)
        places.append(max(left, top))
    room = max(shape) - 60
    counts, _ = np.histogram(np.clip(places, 0, room), bins=4, range=(0, max(1, room)))
    assert (np.abs(counts - 50) < 5 * np.sqrt(50 * 0.75)).all() or room == 0


def test_random_resized_crop_of_everything_is_a_plain_resize(noise: Noise) -> None:
    """The whole of a square picture, against Pillow's resize: byte for byte."""
    picture = noise(50, 50)
    expected = picture.resize((32, 32), Image.Resampling.BICUBIC)
    assert random_resized_crop(picture, 32, np.random.default_rng(0), 1.0).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(2, 2), (2, 200), (3, 2)])
def test_the_smallest_pictures(noise: Noise, shape: tuple[int, int]) -> None:
    """The least that open_rgb lets through becomes a full square in all three crops."""
    picture, rng = noise(*shape), np.random.default_rng(0)
    for cropped in (
        center_crop(picture, 16),
        random_crop(picture, 16, rng),
        random_resized_crop(picture, 16, rng, 0.001),
    ):
        assert cropped.size == (16, 16)


def test_the_generator_decides(noise: Noise) -> None:
    """The same seed gives the same crops whatever NumPy's and PyTorch's own generators do; another seed others."""
    picture = noise(90, 70)

    def crops(seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(3):
            found += [random_crop(picture, 16, rng).tobytes(), random_resized_crop(picture, 16, rng, 0.3).tobytes()]
            np.random.seed(seed)
            torch.manual_seed(seed)
        return found

    first = crops(1)
    assert crops(1) == first
    assert crops(2) != first
    assert len(set(first)) > 3


def test_the_picture_is_left_as_it_was(noise: Noise) -> None:
    """No crop writes into what it was given."""
    picture = noise(40, 30)
    before = picture.tobytes()
    rng = np.random.default_rng(0)
    center_crop(picture, 16), random_crop(picture, 16, rng), random_resized_crop(picture, 16, rng, 0.5)
    assert (picture.size, picture.tobytes()) == ((40, 30), before)


def test_to_tensor_layout(noise: Noise) -> None:
    """(3, H, W) uint8: channel c, row y, column x is what Pillow gives for (x, y); contiguous, its own memory."""
    picture = noise(5, 4)
    tensor = to_tensor(picture)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 4, 5), torch.uint8, True)
    for x in range(5):
        for y in range(4):
            assert tuple(tensor[:, y, x].tolist()) == picture.getpixel((x, y))
    before = picture.tobytes()
    tensor.zero_()
    assert picture.tobytes() == before
