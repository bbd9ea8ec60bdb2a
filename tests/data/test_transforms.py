"""Evaluation's crop: bit for bit against torchvision's arithmetic restated; what is no image."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train_clip.data.crops import Preprocess, center_crop, to_tensor
from train_clip.errors import BadSample, UserError

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


# What is no image


def own() -> Preprocess:
    return Preprocess(32, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    """Python's own error, and ours; what is there and no image is ours alone; a reader of samples knows both."""
    for path in (tmp_path / "gone.png", str(tmp_path / "gone.png")):
        with pytest.raises(FileNotFoundError, match=r"gone\.png: file does not exist") as caught:
            own()(path)
        assert isinstance(caught.value, BadSample)
        assert (caught.value.path, caught.value.reason) == (str(path), "file does not exist")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), again.path, again.reason) == (type(caught.value), str(path), "file does not exist")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(BadSample) as bad:
        own()(tmp_path / "text.png")
    assert not isinstance(bad.value, OSError)


@pytest.mark.parametrize("image", [["a.png", "b.png"], np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), None, b"a"])
def test_neither_a_picture_nor_a_path(image: Any) -> None:
    """A list of paths, an array, a tensor: a TypeError of ours, which names what was found and what to do."""
    with pytest.raises(TypeError, match=f"Found a {type(image).__name__} for an image; expected a picture") as caught:
        own()(image)
    assert isinstance(caught.value, UserError)
