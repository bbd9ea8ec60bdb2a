"""Captions that a mirrored image no longer fits: those that name sides, a sense of turning, or text in the picture.

Words alone are looked at. Text that no caption tells of, and pictures that mean another thing mirrored, go unseen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train_clip.data.pairs import Pair
from train_clip.errors import BadSample

LOOKED_AT = 2000  # pairs: a share of 1% is found to within a fifth of it or so

TURNS_AND_TEXT = """
    clockwise anticlockwise counterclockwise
    letter letters lettering alphabet word words text sign signs says saying written writing handwriting inscription
    label labels labelled labeled logo logos digit digits numeral numerals
"""
SIDES = """
    left right leftmost rightmost leftward leftwards rightward rightwards lefthand righthand
    east west eastern western eastward eastwards westward westwards
"""
HEIGHTS = """
    above below over under beneath underneath top bottom upper lower upside up down upright
    upward upwards downward downwards north south northern southern northward northwards southward southwards
"""
WORDS = {
    "horizontal_flip": frozenset((SIDES + TURNS_AND_TEXT).split()),
    "vertical_flip": frozenset((HEIGHTS + TURNS_AND_TEXT).split()),
}


class Named(NamedTuple):
    """What was found in captions.

    Args:
        number: captions with such a word.
        of: captions that were looked at.
        word: of the example.
        example: the first of them; empty where there is none.
    """

    number: int
    of: int
    word: str
    example: str


def some_captions(pairs: Sequence[Pair], most: int = LOOKED_AT) -> list[str]:
    """All lines of so many pairs at most, evenly spaced; what cannot be read is passed over."""
    captions: list[str] = []
    for place in np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int).tolist():
        try:
            captions += pairs[place].captions()
        except BadSample:
            continue
    return captions


def count_named(captions: Sequence[str], flip: str) -> Named:
    """Count captions with a word that a flip makes wrong.

    Args:
        captions: single lines.
        flip: a key of ``WORDS``.
    """
    number, word, example = 0, "", ""
    for caption in captions:
        found = [each for each in re.findall(r"[^\W\d_]+", caption.lower()) if each in WORDS[flip]]
        if found:
            number += 1
            word, example = (word, example) if example else (found[0], caption)
    return Named(number, len(captions), word, example)
