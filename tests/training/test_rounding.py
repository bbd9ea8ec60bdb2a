"""Rounding by chance to bfloat16: every probability by hand, the mean, and the noise that decides."""

from __future__ import annotations

import math

import pytest
import torch

from train_clip.tensors import seed_of
from train_clip.training.half_precision import draw, round_stochastically

EVERY_NOISE = torch.arange(-(2**15), 2**15).to(torch.int16)
ULP = 2**-7  # of bfloat16, from 1 to 2


def outcomes(value: float) -> tuple[list[float], list[float]]:
    """What a number is rounded to over all 65,536 chances, and how often each."""
    rounded = round_stochastically(torch.full((2**16,), value), EVERY_NOISE).double()
    values, counts = rounded.unique(return_counts=True)
    return values.tolist(), (counts.double() / 2**16).tolist()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [2**-16, 0.25, 0.5, 0.75, 1 - 2**-16])
@pytest.mark.parametrize("low", [1.0, 2.0**-126, 2.0**100, 1.9921875])
def test_the_chance_of_each_neighbour_is_the_distance_to_the_other(low: float, share: float, sign: int) -> None:
    """Numbers between two of bfloat16, by hand: the upper one as often as the share of the way; over all noise."""
    step = ULP * 2.0 ** math.floor(math.log2(low))
    values, chances = outcomes(sign * (low + share * step))
    found = dict(zip(values, chances, strict=True))
    assert found == {sign * low: 1 - share, sign * (low + step): share}


def test_the_mean_is_the_number() -> None:
    """A thousand numbers of all sizes and both signs, float32's smallest among them: the mean over all noise, exact."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) * 10.0 ** torch.randint(-44, 38, (1000,), generator=generator)
    for value in values.tolist():
        rounded = round_stochastically(torch.full((2**16,), value), EVERY_NOISE).double()
        # In units of the number: float64 cannot hold the sum of the smallest otherwise.
        assert rounded.mean().item() == pytest.approx(value, rel=1e-12, abs=0)


def test_numbers_of_bfloat16_stay() -> None:
    """All 65,536 of them, infinities, zeros and NaN included, at the least, a middle and the largest noise."""
    numbers = EVERY_NOISE.view(torch.bfloat16)
    for noise in (-(2**15), 0, 2**15 - 1):
        rounded = round_stochastically(numbers.float(), torch.full((2**16,), noise, dtype=torch.int16))
        torch.testing.assert_close(rounded, numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0xFF800001])
def test_every_nan_stays_nan(bits: int) -> None:
    """Also those whose bits lie next to infinity's, or that a carry would take into the sign: never a number."""
    value = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert round_stochastically(value.expand(2**16).contiguous(), EVERY_NOISE).isnan().all()


def test_the_noise_is_uniform_and_independent() -> None:
    """A million draws in two rows: all 16 bits are fair, every number comes, rows and neighbours do not correlate."""
    generator = torch.Generator()
    generator.manual_seed(seed_of(1, 2, 3))
    noise = draw(generator, 2, 2**19)
    assert noise.shape == (2, 2**19)
    count = noise.numel()
    for bit in range(16):
        ones = ((noise.int() >> bit) & 1).sum().item()
        assert abs(ones - count / 2) < 5 * math.sqrt(count) / 2, bit
    counts = torch.bincount(noise.flatten().int() + 2**15, minlength=2**16).double()
    expected = count / 2**16
    degrees = 2**16 - 1
    assert abs(((counts - expected) ** 2 / expected).sum().item() - degrees) < 5 * math.sqrt(2 * degrees)
    unit = noise.double() / (2**15 / math.sqrt(3))  # of variance 1
    for a, b in ((unit[0], unit[1]), *((unit[0, :-lag], unit[0, lag:]) for lag in (1, 2, 3, 4, 8))):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(len(a))


def test_the_noise_follows_from_its_key() -> None:
    """The same key draws the same, whatever was drawn before; another seed, step, place or shard draws another."""
    generator = torch.Generator()

    def drawn(*key: int) -> bytes:
        generator.manual_seed(seed_of(*key))
        return draw(generator, 1, 999).numpy().tobytes()

    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 1, 0, 1), (0, 0, 1), (2**40, 1, 0)]
    first = [drawn(*key) for key in keys]
    assert len(set(first)) == len(keys)
    assert [drawn(*key) for key in keys] == first
