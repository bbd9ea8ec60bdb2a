"""Pictures and pairs made on the spot, for the tests of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_clip.data.folder import Pair

NumberedPairs = Callable[..., list[Pair]]


@pytest.fixture
def noise() -> Callable[..., Image.Image]:
    """Pictures of random bytes: no two places look alike."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng((seed, width, height))
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture
def numbered_pairs(tmp_path: Path) -> NumberedPairs:
    """Pairs that can be told apart in pixels and words: picture i has the red value 10·i, caption i says "pair i"."""

    def make(number: int, lines: int = 1, side: tuple[int, int] = (20, 24)) -> list[Pair]:
        pairs = []
        for index in range(number):
            pixels = np.random.default_rng(index).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
            pixels[..., 0] = 10 * index
            image, caption = tmp_path / f"p{index:02}.png", tmp_path / f"p{index:02}.txt"
            Image.fromarray(pixels).save(image)
            caption.write_text("\n".join(f"pair {index} line {line}" for line in range(lines)), encoding="utf-8")
            pairs.append(Pair(str(image), str(caption)))
        return pairs

    return make
