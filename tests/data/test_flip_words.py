"""Which captions name what a flip turns round."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_pairs
from train_clip.data.augment import captions_against, some_captions
from train_clip.data.folder import scan_folder

CAPTIONS = [
    "a brightly lit leftover pie",  # neither is a word of its own
    "LEFT-pointing arrow",
    "a bird above the trees",
    "a stop sign",
    "hands at a quarter past, clockwise",
]


@pytest.mark.parametrize(
    ("flip", "expected"),
    [
        ("horizontal_flip", (3, ("left", "LEFT-pointing arrow"))),
        ("vertical_flip", (3, ("above", "a bird above the trees"))),
    ],
)
def test_whole_words_are_counted(flip: str, expected: tuple[int, tuple[str, str]]) -> None:
    """Sides for one flip, heights for the other, text and turns for both; the first word found is the example's."""
    against = captions_against(flip, CAPTIONS)
    assert (len(against), against[0]) == expected
    assert captions_against(flip, CAPTIONS[:1]) == []


def test_the_sample_is_spaced_evenly(tmp_path: Path) -> None:
    """Three of ten pairs, both of their lines; what cannot be read is passed over; more than there are is all."""
    folder = write_pairs(tmp_path / "pairs", 10)
    pairs = scan_folder(folder).require_pairs().pairs
    lines = [pair.captions() for pair in pairs]
    assert some_captions(pairs, 3) == [*lines[0], *lines[4], *lines[9]]
    Path(pairs[4].caption).write_bytes(b"\xff")
    assert some_captions(pairs, 3) == [*lines[0], *lines[9]]
    assert len(some_captions(pairs)) == sum(map(len, lines)) - len(lines[4])
