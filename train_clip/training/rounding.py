"""float32 → bfloat16 by chance, so that the mean over the chances is the number itself.

    x between neighbours a < b of bfloat16:    P(b) = (x - a) / (b - a)        E = x

Rounded to nearest, a change below half the distance to the next number is lost however often it is made. OpenAI's CLIP
was trained with weights that are "rounded up or down at random by their distance" (github.com/openai/CLIP, issue 29).
"""

from __future__ import annotations

import torch
from torch import Tensor

from train_clip.training.seeds import seed_of

HALF_STEP = 1 << 15  # of the 2^16 float32 numbers from one bfloat16 number to the next
TOP_16_BITS = -(1 << 16)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Round each number to one of its two neighbours in bfloat16.

    bfloat16 is the upper half of float32's bits: adding u, uniform in [0, 2^16), carries into it with the probability
    that the lower half has, and the lower half is cut off. Numbers of bfloat16 stay what they are, infinities and NaN
    too; what lies beyond the largest of them may become infinite, as it may when rounded to nearest.

    Args:
        values: (…) float32.
        noise: (…) int16, u - 2^15, uniform over its whole range.

    Returns:
        (…) bfloat16.
    """
    carried = (values.view(torch.int32) + noise).add_(HALF_STEP).bitwise_and_(TOP_16_BITS)
    # Clamped to 1, a number is 1 and NaN is NaN, of which a carry into the sign could have made a number.
    return carried.view(torch.float32).mul_(values.clamp(1.0, 1.0)).to(torch.bfloat16)


class Noise:
    """Random numbers of a run that follow from its seed and a key alone, drawn on whichever device they are for.

    Args:
        seed: 0 or above.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def at(self, device: torch.device, *key: int) -> torch.Generator:
        """A device's generator, at the start of the stream that a key of numbers, 0 or above, stands for."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        reseed(self._generators[device], self._seed, *key)
        return self._generators[device]


def reseed(generator: torch.Generator, *key: int) -> None:
    """Set a generator to the start of the stream that a key of numbers, 0 or above, stands for."""
    generator.manual_seed(seed_of(*key))


def draw(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """Draw noise, four numbers of 16 bits at a time: (rows, length) int16, on the generator's device."""
    count = rows * length
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    # From the least int64 on: without a bound PyTorch draws 63 bits.
    drawn.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return drawn.view(torch.int16)[:count].view(rows, length)
