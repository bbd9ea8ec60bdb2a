"""Evaluation's crop: bit for bit against torchvision's arithmetic restated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from train_clip.data.crops import center_crop, to_tensor

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


@pytest.mark.parametrize("shape", [(2, 2), (2, 200), (3, 2)])
def test_the_smallest_pictures(noise: Noise, shape: tuple[int, int]) -> None:
    """The least that open_rgb lets through becomes a full square."""
    assert center_crop(noise(*shape), 16).size == (16, 16)


def test_the_picture_is_left_as_it_was(noise: Noise) -> None:
    """The crop does not write into what it was given."""
    picture = noise(40, 30)
    before = picture.tobytes()
    center_crop(picture, 16)
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
