"""What repeats and what leaks, of facts made by hand: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from train_clip.data.pairs import IN_TABLE, PairList
from train_clip.data_tools.facts import Facts, perceptual_hash
from train_clip.data_tools.report import find_repeats

FAR = 0xFFFF << 16  # sixteen bits from the hashes around 0


@pytest.mark.parametrize("held_out", [[1, 2, 5], [0, 3, 5]])
def test_similar_images_leak_whichever_hash_is_the_smaller(held_out: list[int]) -> None:
    """Two neighbours twice, one of each held out, once the one of the smaller hash and once the other; and a loner."""
    if perceptual_hash() is None:
        pytest.skip("needs ImageHash")
    looks = [0, 1, FAR, FAR + 2, -1, 0xFF << 48]
    pairs = PairList("/", [f"{place}.png" for place in range(6)], [IN_TABLE + "x"] * 6)
    facts = Facts(6, 77)
    for place, look in enumerate(looks):
        facts.add(place, place + 1, ((9, 9), f"{place}", look), "\n", ())
    found = find_repeats(pairs, facts, np.isin(np.arange(6), held_out))
    repeats, leaks = found["repeats"], found["leaks"]
    assert (repeats["equal"], repeats["near"], leaks["held_out"]) == (0, 4, 3)
    assert (leaks["images"], leaks["images_nearly"], leaks["captions"]) == (0, 2, 0)
    assert sorted(sorted(two) for two in repeats["near_examples"]) == [["0.png", "1.png"], ["2.png", "3.png"]]
