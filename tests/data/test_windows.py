"""Training crops: their law by what is drawn, their pixels against Pillow's, and by where on a ramp they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from train_clip.data.crops import REDUCTIONS, Window, cut, random_crop, random_resized_crop, reduced

Noise = Callable[..., Image.Image]
PILLOWS = 3  # of 255: how far PyTorch's bicubic is from Pillow's on soft noise


def cropped(picture: Image.Image, window: Window) -> np.ndarray:
    """(S, S, 3) int64 of a window of a picture at its full size."""
    pixels = cut(np.array(picture).transpose(2, 0, 1), window)
    assert (pixels.dtype, pixels.is_contiguous()) == (torch.uint8, True)
    return pixels.permute(1, 2, 0).numpy().astype(np.int64)


def by_pillow(picture: Image.Image, window: Window) -> np.ndarray:
    """The same by Pillow alone, in the words of the window's docstring."""
    resized = picture.crop(window.box).resize(window.target, Image.Resampling.BICUBIC)
    left, top = window.place
    return np.asarray(resized.crop((left, top, left + window.size, top + window.size))).astype(np.int64)


def soft(picture: Image.Image) -> Image.Image:
    """Noise of half the contrast, of which nothing overshoots: Pillow and PyTorch clip between passes in two orders."""
    return picture.point(lambda level: 64 + level // 2)


def torchvision_resize(width: int, height: int, size: int) -> tuple[int, int]:
    """Size by ``Resize(size)`` of torchvision 0.2x: _compute_resized_image_output_size."""
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    return (new_short, new_long) if width <= height else (new_long, new_short)


@pytest.mark.parametrize("shape", [(32, 37), (37, 32), (32, 32), (60, 40), (41, 90), (10, 13)])
def test_random_crop_is_any_square_of_the_resized_picture(shape: tuple[int, int]) -> None:
    """600 crops: the whole picture by torchvision's Resize, each place within it as often as another, ±5 deviations."""
    wide, high = torchvision_resize(*shape, 24)
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(600):
        window = random_crop(shape, 24, rng)
        assert window[:2] == ((0, 0, *shape), (wide, high))
        counts[window.place] += 1
    places = {(left, top) for left in range(wide - 23) for top in range(high - 23)}
    assert set(counts) == places
    expected = 600 / len(places)
    assert all(abs(count - expected) <= 5 * np.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("shape", [(60, 40), (41, 90), (10, 13), (24, 30), (30, 24), (640, 480), (2, 200), (3, 2)])
def test_random_crop_is_pillows(noise: Noise, shape: tuple[int, int]) -> None:
    """Enlarged and reduced, wide and tall: Pillow's resize of the whole and its crop, to within 3; equal unresized."""
    picture, rng = soft(noise(*shape)), np.random.default_rng(0)
    for _ in range(20):
        window = random_crop(shape, 24, rng)
        difference = np.abs(cropped(picture, window) - by_pillow(picture, window))
        assert difference.max() <= (0 if min(shape) == 24 else PILLOWS)
        assert difference.mean() < 0.4


@pytest.mark.parametrize("shape", [(60, 40), (41, 90), (10, 13), (300, 200), (2, 200), (3, 2)])
@pytest.mark.parametrize("min_share", [0.1, 0.9])
def test_random_resized_crop_is_pillows(noise: Noise, shape: tuple[int, int], min_share: float) -> None:
    """Cut and then resized, so that nothing outside the square shows: Pillow's crop and resize, to within 3."""
    picture, rng = soft(noise(*shape)), np.random.default_rng(0)
    for _ in range(20):
        window = random_resized_crop(shape, 24, rng, min_share)
        difference = np.abs(cropped(picture, window) - by_pillow(picture, window))
        assert difference.max() <= PILLOWS
        assert difference.mean() < 0.4


def torchvision_side(area: np.ndarray) -> np.ndarray:
    """Side of ``RandomResizedCrop.get_params`` of torchvision 0.2x for ratio=(1, 1), from the area that it drew."""
    aspect_ratio = 1.0
    return np.round(np.sqrt(area * aspect_ratio)).astype(int)


@pytest.mark.parametrize("shape", [(9, 9), (14, 9), (9, 12)])
def test_random_resized_crop_is_a_window_of_the_law(shape: tuple[int, int]) -> None:
    """8,000 squares inside the picture, each as often as torchvision's law says, ±5 deviations."""
    # Areas are shares of the largest square: on a square picture that is torchvision's law, elsewhere there is room for
    # each of them and no need of its fallback, the centre.
    (width, height), least = shape, min(shape)
    areas = np.linspace(0.25, 1, 100_001) * least**2
    share_of_side = Counter(torchvision_side(areas).tolist())
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int, int, int]] = Counter()
    for _ in range(8000):
        window = random_resized_crop(shape, 8, rng, 0.25)
        left, top, right, bottom = window.box
        assert right - left == bottom - top
        assert window[1:] == ((8, 8), (0, 0), 8)
        counts[right - left, left, top] += 1
    for side in range(5, 10):
        places = [(left, top) for left in range(width - side + 1) for top in range(height - side + 1)]
        for left, top in places:
            expected = 8000 * share_of_side[side] / len(areas) / len(places)
            assert abs(counts[side, left, top] - expected) <= 5 * np.sqrt(expected), (side, left, top)
    assert sum(count for (side, _, _), count in counts.items() if side == 4) <= 5
    assert all(4 <= side <= least for side, _, _ in counts)
    assert all(0 <= left <= width - side and 0 <= top <= height - side for side, left, top in counts)


@pytest.mark.parametrize("min_share", [0.1, 0.5, 0.9])
def test_random_resized_crop_keeps_its_share(min_share: float) -> None:
    """A square picture: shares of its area within the bounds, uniform in quarters."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        left, _, right, _ = random_resized_crop((200, 200), 64, rng, min_share).box
        shares.append((right - left) ** 2 / 200**2)
    # The side is a whole number of pixels: half a pixel of 200 is half a hundredth of the area.
    assert min(shares) > min_share - 0.01
    assert max(shares) <= 1
    counts, _ = np.histogram(np.clip(shares, min_share, 1), bins=4, range=(min_share, 1))
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.75)).all()


@pytest.mark.parametrize("shape", [(240, 60), (60, 241), (60, 60)])
def test_random_resized_crop_of_the_largest_square_lies_anywhere(shape: tuple[int, int]) -> None:
    """A least share of 1: the whole shorter side, whatever the aspect, and along the longer one from end to end."""
    rng = np.random.default_rng(0)
    places = []
    for _ in range(200):
        left, top, right, bottom = random_resized_crop(shape, 30, rng, 1.0).box
        assert (right - left, bottom - top, min(left, top)) == (60, 60, 0)
        places.append(max(left, top))
    room = max(shape) - 60
    counts, _ = np.histogram(np.clip(places, 0, room), bins=4, range=(0, max(1, room)))
    assert (np.abs(counts - 50) < 5 * np.sqrt(50 * 0.75)).all() or room == 0


def ramp(width: int, height: int, reduction: int = 1) -> np.ndarray:
    """(3, H, W) uint8, reduced: red says the column of the middle, green the row, of a picture of that size."""
    wide, high = round(width / reduction), round(height / reduction)
    pixels = np.zeros((3, high, wide), dtype=np.uint8)
    pixels[0] = np.round((np.arange(wide) + 0.5) * reduction - 0.5)
    pixels[1] = np.round((np.arange(high) + 0.5) * reduction - 0.5)[:, None]
    return pixels


def seen(pixels: Tensor) -> list[float]:
    """Left, top, right and bottom of what a square (3, S, S) of a ramp shows, to about a pixel.

    Pixel j of S shows the place left + (j + ½) · side / S - ½. A tenth at each edge is left out: there bicubic weights
    are cut off by the picture's edge.
    """
    size = pixels.shape[-1]
    inner = np.arange(size // 10, size - size // 10)
    edges = []
    for channel, axis in ((0, 0), (1, 1)):
        line = pixels[channel].numpy().astype(float).mean(axis=axis)[inner]
        slope, start = np.polyfit(inner + 0.5, line + 0.5, 1)
        edges.append((start, start + slope * size))
    return [edge for pair in zip(*edges, strict=True) for edge in pair]


@pytest.mark.parametrize("reduction", [1, *REDUCTIONS])
@pytest.mark.parametrize("shape", [(240, 160), (161, 233), (199, 199)])
def test_reduced_pixels_show_the_same_window(shape: tuple[int, int], reduction: int) -> None:
    """A ramp at each scale: the edges of both crops, read off the colours, to half a reduced pixel and the reading."""
    rng, room = np.random.default_rng(0), reduction / 2 + 1
    pixels = ramp(*shape, reduction)
    for _ in range(50):
        paper, square = random_crop(shape, 20, rng), random_resized_crop(shape, 20, rng, 0.5)
        (left, top), (wide, high) = paper.place, (shape[0] / paper.target[0], shape[1] / paper.target[1])
        edges = [left * wide, top * high, (left + 20) * wide, (top + 20) * high]
        assert seen(cut(pixels, paper, reduction)) == pytest.approx(edges, abs=room)
        assert seen(cut(pixels, square, reduction)) == pytest.approx(square.box, abs=room)


def enough(window: Window, reduction: int) -> bool:
    """Whether the box, reduced, is no smaller than its target along either side."""
    left, top, right, bottom = window.box
    return right - left >= reduction * window.target[0] and bottom - top >= reduction * window.target[1]


sides = st.integers(2, 5000)


@given(sides, sides, st.integers(1, 600), st.floats(0.01, 1), st.integers(0, 9))
def test_the_reduction_is_the_largest_that_leaves_enough(
    width: int, height: int, size: int, share: float, seed: int
) -> None:
    """Each box reduced is no smaller than its target along either side, and at twice the reduction it would be."""
    rng = np.random.default_rng(seed)
    for window in (
        random_crop((width, height), size, rng),
        random_resized_crop((width, height), size, rng, share),
    ):
        assert window.reduction in (1, 2, 4, 8)
        assert window.reduction == 1 or enough(window, window.reduction)
        assert window.reduction == 8 or not enough(window, 2 * window.reduction)
        if window.reduction > 1:
            left, top, right, bottom = (reduced(edge, window.reduction) for edge in window.box)
            assert right - left >= window.target[0]
            assert bottom - top >= window.target[1]


def test_the_generator_decides() -> None:
    """The same seed gives the same windows whatever NumPy's and PyTorch's own generators do; another seed others."""

    def windows(seed: int) -> list[Window]:
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(3):
            found += [random_crop((90, 70), 16, rng), random_resized_crop((90, 70), 16, rng, 0.3)]
            np.random.seed(seed)
            torch.manual_seed(seed)
        return found

    first = windows(1)
    assert windows(1) == first
    assert windows(2) != first
    assert len(set(first)) > 3


def test_the_pixels_are_left_as_they_were() -> None:
    """No crop writes into what it was given, or shares its memory, where nothing is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 40), dtype=np.uint8)
    before = pixels.copy()
    pixels.flags.writeable = False
    window = random_crop((40, 16), 16, np.random.default_rng(0))
    found = cut(pixels, window)
    assert np.array_equal(found.numpy(), before[:, :, window.place[0] : window.place[0] + 16])
    found.zero_()
    assert np.array_equal(pixels, before)
