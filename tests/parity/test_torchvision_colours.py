"""Changes of colour against torchvision's, one at a time: the same factor, the same picture, in whole numbers.

Hue is left out: torchvision turns HSV's, this package that of a constant luma.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from train_clip.data.augment import LUMA, colour_maps, recolour

functional = pytest.importorskip("torchvision.transforms.v2.functional")

PIXELS = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
# A soft picture, whose mean luma is far from the middle, beside noise.
PIXELS[0] = (PIXELS[0].float() / 8 + torch.linspace(0, 60, 40)).to(torch.uint8)


def recoloured(b: float = 1.0, c: float = 1.0, s: float = 1.0) -> Tensor:
    """Brightness, contrast and saturation by this package."""
    columns = [np.full(len(PIXELS), value) for value in (b, c, s, 0.0)]
    lifts = torch.from_numpy((columns[0] * (1 - columns[1]))[:, None] * LUMA).float()
    return recolour(PIXELS, torch.from_numpy(colour_maps(*columns)).float(), lifts)


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.75, 1.0, 1.3, 1.8])
@pytest.mark.parametrize(
    ("option", "theirs"),
    [("b", functional.adjust_brightness), ("c", functional.adjust_contrast), ("s", functional.adjust_saturation)],
    ids=["brightness", "contrast", "saturation"],
)
def test_one_operation_at_a_time(option, theirs, factor):
    """Of floats, against ours in bytes: half a rounding step, and their weight of red, 0.2989 in place of 0.299."""
    expected = theirs(PIXELS.float() / 255, factor) * 255
    assert (recoloured(**{option: factor}) - expected).abs().max() <= 0.5 + 1e-4 * 255 * max(1, abs(1 - factor))


def test_grey():
    """Saturation by 0 is their greyscale in three channels."""
    expected = functional.rgb_to_grayscale(PIXELS.float() / 255, num_output_channels=3) * 255
    assert (recoloured(s=0.0) - expected).abs().max() <= 0.5 + 1e-4 * 255
