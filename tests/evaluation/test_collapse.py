"""What is said of a model that maps all to one point; whole commands: tests/commands/test_evaluate.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from train_clip.evaluation.embed import EMBED_AT_ONCE, Collection, find_collapse

CLASSES = [str(number) for number in range(10_000)]


@pytest.mark.parametrize(
    ("different", "embedded"),
    [([1], EMBED_AT_ONCE), ([EMBED_AT_ONCE], 2 * EMBED_AT_ONCE), ([9_999], 10_000), ([], 10_000)],
)
def test_class_names_are_embedded_until_one_differs(different, embedded):
    """Of 10,000: the names from the first one on, at one point but for one, or all of them."""
    images, names = F.normalize(torch.randn(3, 4), dim=1), list[str]()

    def embed_texts(some: list[str]) -> torch.Tensor:
        names.extend(some)
        return torch.eye(4)[[int(int(name) in different) for name in some]]

    collection = Collection([], images, [], images, [], torch.zeros(3), CLASSES, ["{}"], [], embed_texts, [])
    found = find_collapse(collection)
    assert found == (None if different else "Collapsed: all class names have the same embedding, up to rounding. "
                     "The model cannot tell them apart.")  # fmt: skip
    assert names == CLASSES[:embedded]
