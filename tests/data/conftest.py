"""Pictures and pairs made on the spot, for the tests of the data."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_clip.data.images import image_suffixes
from train_clip.data.pairs import Pair

NOBODY = 65_534
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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, other than pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    folder.chmod(0o755)
    yield folder
    for inside in folder.rglob("*"):
        if inside.is_dir() and not inside.is_symlink():
            inside.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], None]], None]:
    """Run a function in a process that may read only what everybody may; its failure is the test's."""
    if not hasattr(os, "fork") or os.geteuid() != 0:
        pytest.skip("only root can become somebody else")

    def run(look: Callable[[], None]) -> None:
        image_suffixes()  # Pillow imports its readers at the first use, and nobody may not read them everywhere
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                look()
            except BaseException:
                os.write(writing, traceback.format_exc().encode("utf-8", "backslashreplace")[-10_000:])
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as stream:  # noqa: PTH123, a pipe's end
            failure = stream.read().decode("utf-8")
        os.waitpid(child, 0)
        assert not failure, failure

    return run
