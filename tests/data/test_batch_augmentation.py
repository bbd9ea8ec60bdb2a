"""Colours and flips of batches, against loops over pixels in float64; and what is drawn for them.

B  images      S  side in pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from train_clip.data import augment as batch_augmentation
from train_clip.data.augment import Draws, augment, colour_maps, draw_batch
from train_clip.errors import UserError
from train_clip.options import AugmentationOptions

B, S = 5, 6
PIXELS = torch.randint(256, (B, 3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FULL = AugmentationOptions(color_jitter=1.0, grayscale=0.2, horizontal_flip=0.5, vertical_flip=0.5)
# Of each image: brightness, contrast, saturation, angle. Some leave the range, one is grey, one stays as it is.
DRAWN = [(1.7, 0.3, 1.6, 0.9), (0.2, 1.8, 0.4, -1.2), (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0), (0.8, 0.0, 1.2, 3.0)]
MIRRORED, UPENDED = [True, False, True, False, False], [False, True, True, False, True]

Colour = Sequence[float]
Step = Callable[[list[list[Colour]], float], list[list[Colour]]]


def luma(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def brightness(rows: list[list[Colour]], by: float) -> list[list[Colour]]:
    return [[[by * value for value in colour] for colour in row] for row in rows]


def contrast(rows: list[list[Colour]], by: float) -> list[list[Colour]]:
    mean = sum(luma(colour) for row in rows for colour in row) / (S * S)
    return [[[by * value + (1 - by) * mean for value in colour] for colour in row] for row in rows]


def saturation(rows: list[list[Colour]], by: float) -> list[list[Colour]]:
    return [[[by * value + (1 - by) * luma(colour) for value in colour] for colour in row] for row in rows]


def hue(rows: list[list[Colour]], by: float) -> list[list[Colour]]:
    """To Y, U and V, turned in the plane of U and V, and back."""

    def turned(colour: Colour) -> Colour:
        y = luma(colour)
        u, v = 0.493 * (colour[2] - y), 0.877 * (colour[0] - y)
        u, v = u * math.cos(by) - v * math.sin(by), u * math.sin(by) + v * math.cos(by)
        red, blue = y + v / 0.877, y + u / 0.493
        return [red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue]

    return [[turned(colour) for colour in row] for row in rows]


def by_loops(image: Tensor, drawn: Colour, order: Sequence[int], mirrored: bool, upended: bool) -> list:
    """One image, (S, S, 3) numbers: flips, the four steps in an order, then cut to the range."""
    rows = image.permute(1, 2, 0).double().tolist()
    rows = [row[::-1] for row in rows] if mirrored else rows
    rows = rows[::-1] if upended else rows
    steps: list[Step] = [brightness, contrast, saturation, hue]
    for step in order:
        rows = steps[step](rows, drawn[step])
    return [[[min(max(value, 0.0), 255.0) for value in colour] for colour in row] for row in rows]


def drawn_by_hand() -> Draws:
    b, c, s, angles = (np.array(column) for column in zip(*DRAWN, strict=True))
    maps = torch.from_numpy(colour_maps(b, c, s, angles)).float()
    lifts = torch.from_numpy((b * (1 - c))[:, None] * batch_augmentation.LUMA).float()
    return Draws(maps, lifts, torch.tensor(MIRRORED), torch.tensor(UPENDED))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
@pytest.mark.parametrize("piece", [1, 2 * 3 * S * S, 10**9], ids="in pieces of {} numbers".format)
def test_one_map_of_colours_is_all_steps_in_any_order(
    monkeypatch: pytest.MonkeyPatch, order: Sequence[int], piece: int
) -> None:
    """Pixel by pixel, step after step, in float64, in three orders: the nearest whole number, to float32's rounding."""
    monkeypatch.setattr(batch_augmentation, "PIECE_ON_CPU", piece)
    before = PIXELS.clone()
    found = augment(PIXELS, FULL, drawn_by_hand())
    assert found.dtype == torch.uint8
    cut = 0
    for row in range(B):
        expected = torch.tensor(by_loops(PIXELS[row], DRAWN[row], order, MIRRORED[row], UPENDED[row])).permute(2, 0, 1)
        assert (found[row] - expected).abs().max() <= 0.5 + 1e-4
        cut += int(((expected == 0) | (expected == 255)).sum())
    assert 20 < cut < PIXELS.numel() / 2
    assert torch.equal(found[3], PIXELS[3])
    assert torch.equal(PIXELS, before)


def test_what_is_drawn_has_its_ranges_and_shares() -> None:
    """100,000 images at half of SimCLR's strength: four factors out of each map, uniform; a fifth is not jittered."""
    number = 100_000
    draws = draw_batch(
        AugmentationOptions(color_jitter=0.5, grayscale=0.3, horizontal_flip=0.25, vertical_flip=0.75),
        (0, 7),
        slice(None),
        number,
    )
    maps, lifts = draws.mixes.double(), draws.lifts.double().sum(1)
    b = maps.sum(2)[:, 0] + lifts
    c = maps.sum(2)[:, 0] / b
    plain = maps / (b * c)[:, None, None]
    s = torch.linalg.det(plain).clamp(min=0).sqrt()
    grey = s < 1e-3
    cosines = (plain.diagonal(dim1=1, dim2=2).sum(1) - 1) / (2 * s)
    kept = (b - 1).abs() < 1e-6
    assert kept.double().mean() == pytest.approx(0.2, abs=0.01)
    assert grey.double().mean() == pytest.approx(0.3, abs=0.01)
    assert draws.mirrored.double().mean() == pytest.approx(0.25, abs=0.01)
    assert draws.upended.double().mean() == pytest.approx(0.75, abs=0.01)
    for factor in (b[~kept], c[~kept], s[~kept & ~grey]):
        # 1 ± 0.8 · 0.5, and the standard deviation of a uniform number.
        assert (factor.min(), factor.max()) == pytest.approx((0.6, 1.4), abs=1e-3)
        assert (factor.mean(), factor.std()) == pytest.approx((1.0, 0.8 / math.sqrt(12)), abs=5e-3)
    angles = cosines[~kept & ~grey].clamp(max=1).arccos() / (2 * math.pi)
    assert (angles.max(), angles.mean()) == pytest.approx((0.1, 0.05), abs=1e-3)
    # No two draws of an image go together. Of red, what becomes green less what becomes blue grows with the angle.
    flips, turn = (draws.mirrored.double(), draws.upended.double()), plain[:, 1, 0] - plain[:, 2, 0]
    for table in (torch.stack([b, c, *flips, grey.double()])[:, ~kept], torch.stack([b, c, s, turn])[:, ~kept & ~grey]):
        assert (torch.corrcoef(table) - torch.eye(len(table))).abs().max() < 0.02


def test_no_factor_is_below_none() -> None:
    """At the greatest strength, 2: brightness from 0, not from -0.6, to 2.6."""
    draws = draw_batch(AugmentationOptions(color_jitter=2.0), (0, 0), slice(None), 10_000)
    b = draws.mixes.sum(2)[:, 0] + draws.lifts.sum(1)
    assert (b.min().item(), b.max().item()) == pytest.approx((0.0, 2.6), abs=5e-3)


def test_hue_turns_both_ways() -> None:
    """Of a pure red: over 1,000 draws as many turn towards yellow as towards magenta."""
    maps = draw_batch(AugmentationOptions(color_jitter=1.0), (0, 0), slice(None), 1000).mixes
    green, blue = (maps[:, channel, 0] for channel in (1, 2))
    turned = maps[(maps - torch.eye(3)).abs().amax((1, 2)) > 1e-6]
    assert len(turned) == pytest.approx(800, abs=50)
    assert int((green > blue).sum()) == pytest.approx(400, abs=50)
    assert int((blue > green).sum()) == pytest.approx(400, abs=50)


def test_an_image_is_drawn_by_its_place_in_the_global_batch() -> None:
    """Two halves of eight are the eight; other batches, seeds and places are drawn otherwise."""
    whole = draw_batch(FULL, (3, 5), slice(0, 8), 8)
    for rows in (slice(0, 4), slice(4, 8)):
        part = draw_batch(FULL, (3, 5), rows, 8)
        for name in Draws._fields:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    found = [whole.lifts, *(draw_batch(FULL, place, slice(0, 8), 8).lifts for place in ((3, 6), (4, 5), (5, 3)))]
    numbers = torch.cat(found).sum(1)
    assert len(numbers[numbers != 0].unique()) == int((numbers != 0).sum()) > 16


def test_another_option_leaves_the_draws_of_the_first() -> None:
    """Flips beside a jitter: the same jitter."""
    alone, beside = (draw_batch(how, (0, 0), slice(None), 32) for how in (AugmentationOptions(color_jitter=1.0), FULL))
    grey = torch.linalg.det(beside.mixes.double()).abs() < 1e-6
    assert 0 < int(grey.sum()) < 16
    assert torch.equal(alone.mixes[~grey], beside.mixes[~grey])
    assert torch.equal(alone.lifts, beside.lifts)


def test_half_precision_around_it_changes_nothing() -> None:
    """Under autocast, as a step of bf16-mixed has it: the same bytes."""
    plain = augment(PIXELS, FULL, drawn_by_hand())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(PIXELS, FULL, drawn_by_hand()), plain)


def test_normalised_pixels_are_flipped_and_not_recoloured() -> None:
    """Floats: mirrored exactly; a change of colour is refused."""
    floats = PIXELS.float() / 100 - 1
    found = augment(floats, AugmentationOptions(horizontal_flip=0.5), drawn_by_hand())
    expected = [image.flip(2) if mirrored else image for image, mirrored in zip(floats, MIRRORED, strict=True)]
    assert torch.equal(found, torch.stack(expected))
    for how in (AugmentationOptions(color_jitter=0.5), AugmentationOptions(grayscale=0.1)):
        with pytest.raises(UserError, match=r"images are torch\.float32: already normalized.*Expected bytes"):
            augment(floats, how, drawn_by_hand())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color_jitter": -0.1}, r"color_jitter is -0\.1; expected from 0 \(none\) to 2"),
        ({"color_jitter": 2.5}, r"color_jitter is 2\.5"),
        ({"grayscale": 1.1}, r"grayscale is 1\.1; expected from 0 to 1"),
        ({"horizontal_flip": -1}, "horizontal_flip is -1"),
        ({"vertical_flip": math.nan}, "vertical_flip is nan"),
    ],
)
def test_numbers_that_cannot_work(options: dict[str, float], message: str) -> None:
    """Out of range: refused by name."""
    with pytest.raises(UserError, match=message):
        AugmentationOptions(**options)
