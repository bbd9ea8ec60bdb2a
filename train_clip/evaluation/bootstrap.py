"""Intervals of figures by the bootstrap over images: an image is drawn with all its captions, which hang together.

What is searched, all candidates and classes, stays as it is. The draws depend on the number of images alone, so that
two models are compared on the same ones.

R  resamples      N  images      Q  queries, images or captions, each of one image
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
HELD = 2**22  # numbers that are held at a time, or those of one resample

Intervals = dict[str, list[float]]
"""Percentile intervals, lower and upper bound, by the names of the figures."""


def replicates(result: Any, members: Tensor) -> dict[str, Tensor]:
    """The figures of ``RESAMPLES`` resamples of those images, places in N: (R,) float64 each.

    ``result.resampled`` maps (r, N) float64, how often each image is drawn, to figures (r,), and ``result.width`` says
    how many numbers it holds for one resample, at least N.
    """
    drawn, parts = _draws(members.numpy(), result.num_images), list[dict[str, Tensor]]()
    while some := list(islice(drawn, max(1, HELD // result.width))):
        parts.append(result.resampled(torch.from_numpy(np.stack(some)).double()))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def intervals(found: dict[str, Tensor]) -> Intervals:
    """Percentile intervals of (R,) values each; a resample in which a figure has no value (NaN) is left out."""
    bounds = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    return {
        name: np.nanquantile(values.numpy(), bounds).tolist()
        for name, values in found.items()
        if not values.isnan().all()
    }


def of_images(result: Any) -> Intervals:
    """The intervals of a result's figures, over all its images."""
    return intervals(replicates(result, torch.arange(result.num_images)))


def shown(interval: list[float] | None, form: str = "{:.1%}") -> str:
    """An interval as "[31.0%, 37.5%]"; nothing where there is none."""
    return "" if interval is None else f"[{', '.join(map(form.format, interval))}]"


def median(values: Tensor, weights: Tensor) -> Tensor:
    """The median of (Q,) values, each as often as (r, Q) weights, whole numbers, say: (r,) float64, NaN of nothing."""
    values, order = values.double().sort()
    reached = weights[:, order].cumsum(dim=1)
    total = reached[:, -1:]
    middle = torch.cat([(total - 1).div(2, rounding_mode="floor"), total.div(2, rounding_mode="floor")], dim=1)
    places = torch.searchsorted(reached, middle, right=True).clamp(max=len(values) - 1)
    return values[places].mean(dim=1).where(total[:, 0] > 0, torch.nan)


def _draws(members: np.ndarray, num_images: int) -> Iterator[np.ndarray]:
    generator, number = np.random.default_rng(SEED), len(members)
    for _ in range(RESAMPLES):
        yield np.bincount(members[generator.integers(number, size=number)], minlength=num_images)
