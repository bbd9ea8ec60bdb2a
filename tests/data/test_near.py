"""Nearly equal hashes, against a comparison of all with all."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.everything import drawing, encoded
from train_clip.data.images import upright_rgb
from train_clip.data_tools.facts import perceptual_hash
from train_clip.data_tools.report import NEAR_BITS, near_pairs


def found(hashes: list[int], most: int) -> set[tuple[int, int]]:
    """Places of the pairs, each once."""
    array = np.array(hashes, dtype=np.uint64)
    return {
        (min(two), max(two))
        for one, other in near_pairs(array, most)
        for two in zip(one.tolist(), other.tolist(), strict=True)
    }


def by_force(hashes: list[int], most: int) -> set[tuple[int, int]]:
    return {(a, b) for a, b in combinations(range(len(hashes)), 2) if (hashes[a] ^ hashes[b]).bit_count() <= most}


@settings(max_examples=100, deadline=None)
@given(
    centres=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=7)), max_size=30),
    most=st.integers(0, 6),
)
def test_any_hashes(centres: list[int], flips: list[tuple[int, set[int]]], most: int) -> None:
    """Clusters around a few hashes, up to seven bits away: the pairs within 0 to 6 bits."""
    hashes = list({centres[at % len(centres)] ^ sum(1 << bit for bit in bits) for at, bits in flips})
    assert found(hashes, most) == by_force(hashes, most)


def test_a_crowd() -> None:
    """Two thousand hashes of twelve bits, which share most of their pieces."""
    hashes = np.random.default_rng(0).permutation(2**12)[:2000].tolist()
    assert found(hashes, 2) == by_force(hashes, 2)


@pytest.mark.parametrize("hashes", [[], [7]])
def test_nothing_to_compare(hashes: list[int]) -> None:
    """No hash and a single one: no pair."""
    assert found(hashes, NEAR_BITS) == set()


def test_what_becomes_of_a_picture_on_its_way_through_the_web() -> None:
    """Recompressed, halved, both: within the bits; fifty others: not. Of eight pictures each."""
    look = perceptual_hash()
    if look is None:
        pytest.skip("needs ImageHash")
    pictures = [drawing(seed, 300, 200) for seed in range(8)]
    for picture in pictures:
        own = look(picture)
        half = picture.resize((150, 100), Image.Resampling.BICUBIC)
        for changed in (reopened(picture, 70), half, reopened(half, 50)):
            assert ((own ^ look(changed)) & (2**64 - 1)).bit_count() <= NEAR_BITS
    own = look(pictures[0])
    assert all(((own ^ look(drawing(seed, 300, 200))) & (2**64 - 1)).bit_count() > 10 for seed in range(100, 150))


def reopened(picture: Image.Image, quality: int) -> Image.Image:
    import io

    return upright_rgb(Image.open(io.BytesIO(encoded(picture, "JPEG", quality=quality))), "a", [])
