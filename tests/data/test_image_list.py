"""Images for scoring: in order, each named by its index, bad ones reported and never replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train_clip.data.crops import center_crop, to_tensor
from train_clip.data.samples import Skip, image_loader


@pytest.fixture
def paths(tmp_path: Path, noise: Callable[..., Image.Image]) -> list[str]:
    """Seven files, the third and the seventh no images."""
    for index in range(7):
        noise(20 + index, 30, seed=index).save(tmp_path / f"{index}.png")
    for index in (2, 6):
        (tmp_path / f"{index}.png").write_bytes(b"<html>")
    return [str(tmp_path / f"{index}.png") for index in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_image_once_and_in_order(paths: list[str], batch_size: int, workers: int) -> None:
    """All batches joined, against each file decoded and cropped here; bad files only among the skips."""
    if workers and batch_size != 3:
        pytest.skip("one batch size with workers is enough")
    kept: list[int] = []
    skips: list[Skip] = []
    for indices, pixels, bad in image_loader(paths, 16, batch_size, workers):
        assert len(indices) == len(pixels)
        for index, image in zip(indices, pixels, strict=True):
            with Image.open(paths[index]) as picture:
                assert torch.equal(image, to_tensor(center_crop(picture, 16)))
        kept += indices
        skips += bad
    assert kept == [0, 1, 3, 4, 5]
    assert skips == [Skip(paths[index], "not an image but an HTML page") for index in (2, 6)]


def test_a_batch_of_bad_files_is_empty(paths: list[str]) -> None:
    """Nothing but bad files: no index, no pixels, two skips."""
    ((indices, pixels, bad),) = image_loader([paths[2], paths[6]], 16, 5, 0)
    assert (indices, len(pixels), len(bad)) == ([], 0, 2)


def test_one_at_a_time(paths: list[str]) -> None:
    """The index comes with the pixels, or there is what is wrong."""
    files = list(image_loader(paths, 16, 1, 0))
    assert len(files) == 7
    indices, pixels, skips = files[1]
    assert (indices, skips) == ([1], [])
    assert (pixels.shape, pixels.dtype) == ((1, 3, 16, 16), torch.uint8)
    assert np.asarray(pixels).max() > 100
    indices, pixels, skips = files[2]
    assert (indices, len(pixels), skips) == ([], 0, [Skip(paths[2], "not an image but an HTML page")])
