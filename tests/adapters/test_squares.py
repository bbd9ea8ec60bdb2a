"""Training's windows where a picture is squashed, resized to more than is cut out, or resized bilinearly."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapters.tiny_families import photographs
from train_clip.data import arrays, crops
from train_clip.data.crops import Square
from train_clip.errors import UserError


def square(size: int, **how: object) -> Square:
    made = Square(size)
    vars(made).update(how)
    return made


WIDE = (131, 67)


def by_pillow(file, whole: tuple[int, int], kind: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB").resize(whole, kind)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_a_squashed_picture_is_trained_on_whole(kind, tmp_path):
    """Without --resize_ratio: Pillow's squashed picture, which evaluation takes bit for bit, to within 3 of 255."""
    file, size = photographs(tmp_path)[4], square(32, squashed=True, resampling=kind)
    expected = by_pillow(file, (32, 32), Image.Resampling[kind.upper()])
    assert np.array_equal(crops.centre_square(file, size).numpy(), expected)
    window = partial(crops.random_crop, size=size, rng=np.random.default_rng(0))
    found = crops.read_square(str(file), size, window).numpy()
    assert found.shape == (3, 32, 32) and abs(found - expected).max() <= 3


def test_a_square_out_of_a_larger_one(tmp_path):
    """ALIGN's: squashed to 37, 32 of it at a random place in training, the middle in evaluation."""
    file, size = photographs(tmp_path)[4], square(32, whole=37, squashed=True)
    expected, places = by_pillow(file, (37, 37), Image.Resampling.BICUBIC), set()
    assert np.array_equal(crops.centre_square(file, size).numpy(), expected[:, 2:34, 2:34])
    for seed in range(40):
        window = crops.random_crop(WIDE, size, np.random.default_rng(seed))
        left, top = window.place
        places |= {left, top}
        part = crops.read_square(str(file), size, lambda _, window=window: window).numpy()
        assert abs(part - expected[:, top : top + 32, left : left + 32]).max() <= 3
    assert places == set(range(6))


def test_parts_of_a_squashed_picture_have_its_form():
    """With a least share: the area in that range, the picture's own form, anywhere within it."""
    size, shares = square(32, squashed=True), []
    for seed in range(300):
        window = crops.random_resized_crop(WIDE, size, np.random.default_rng(seed), 0.25)
        left, top, right, bottom = window.box
        assert 0 <= left < right <= WIDE[0] and 0 <= top < bottom <= WIDE[1] and window.target == (32, 32)
        assert (right - left) / (bottom - top) == pytest.approx(WIDE[0] / WIDE[1], rel=0.03)
        shares.append((right - left) * (bottom - top) / (WIDE[0] * WIDE[1]))
    assert 0.24 < min(shares) < 0.3 and 0.95 < max(shares) <= 1


def test_a_square_is_a_number_that_travels():
    """To loader processes and copies with what it says; where a number is asked for it is one."""
    size = square(32, whole=37, squashed=True, resampling="bilinear")
    for other in (pickle.loads(pickle.dumps(size)), copy.deepcopy(size)):
        assert other == 32 and vars(other) == vars(size) and isinstance(other, Square)
    assert torch.zeros(3, size, size).shape == (3, 32, 32) and f"{size}" == "32"


def test_a_plain_number_is_clips_way(tmp_path):
    """The same windows for a number and for the square of that number."""
    for file in photographs(tmp_path):
        picture = Image.open(file).size
        for draw in (crops.random_crop, partial(crops.random_resized_crop, min_share=0.5)):
            plain, of_square = (draw(picture, size=size, rng=np.random.default_rng(1)) for size in (24, Square(24)))
            assert plain == of_square


@pytest.mark.parametrize("how", [{"squashed": True}, {"whole": 37}, {"resampling": "bilinear"}])
def test_arrays_are_refused_that_were_resized_in_another_way(how, tmp_path):
    """Of `data npz`, in training and evaluation; CLIP's way, and pixels that are normalized, are taken."""
    file = tmp_path / "a.npz"
    arrays.write_array(file, np.zeros((3, 32, 48), np.uint8))
    crops.read_square(str(file), square(32, whole=32))
    for draw in (None, partial(crops.random_crop, size=32, rng=np.random.default_rng(0))):
        with pytest.raises(UserError, match="Train on the images: move npz/ away"):
            crops.read_square(str(file), square(32, **how), draw)
    arrays.write_array(file, np.zeros((3, 32, 32), np.float32))
    crops.read_square(str(file), square(32, **how))
