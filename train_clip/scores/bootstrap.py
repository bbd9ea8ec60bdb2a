"""Intervals of figures by the bootstrap over images: an image is drawn with all its captions, which hang together.

What is searched, all candidates and classes, stays as it is. The draws depend on the number of images alone, so that
two models are compared on the same ones.

R  resamples      N  images      Q  queries, images or captions, each of one image
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train_clip.evaluation.retrieval import WAYS, Retrieval
from train_clip.evaluation.zero_shot import MEAN, TOP1, TOP5, ZeroShot
from train_clip.printing import Intervals

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
HELD = 2**22  # numbers that are held at a time, or those of one resample


def resampled(result: Any, weights: Tensor) -> dict[str, Tensor]:
    """The figures of resamples, (r,) each; (r, N) float64 weights say how often each image is drawn."""
    if isinstance(result, Retrieval):
        found, recalls = dict[str, Tensor](), (result.image_to_text, result.text_to_image)
        for way, (images, ranks), recall in zip(WAYS, result.queries, recalls, strict=True):
            drawn = weights[:, images]
            found |= {f"R@{k} {way}": drawn @ (ranks <= k).double() / drawn.sum(dim=1) for k in recall}
            found[f"median rank {way}"] = median(ranks, drawn)
        return found
    if isinstance(result, ZeroShot):
        right, none = weights * (result.places < 1), torch.zeros(len(weights), result.num_classes, dtype=weights.dtype)
        of_class = none.index_add(1, result.labels, right) / none.index_add(1, result.labels, weights)
        top1, top5 = ((weights * (result.places < k)).sum(dim=1) / weights.sum(dim=1) for k in (1, 5))
        shares = {TOP1: top1, TOP5: top5, MEAN: of_class.nanmean(dim=1)}
        return {name: shares[name] for name in result.figures()}
    own: dict[str, Tensor] = result.resampled(weights)
    return own


def replicates(result: Any, members: Tensor) -> dict[str, Tensor]:
    """The figures of ``RESAMPLES`` resamples of those images, places in N: (R,) float64 each."""
    drawn, parts = _draws(members.numpy(), result.num_images), list[dict[str, Tensor]]()
    queries = [query.ranks for query in result.queries] if isinstance(result, Retrieval) else []
    width = max(4 * result.num_images, getattr(result, "num_classes", 0), *map(len, queries))
    while some := list(islice(drawn, max(1, HELD // width))):
        parts.append(resampled(result, torch.from_numpy(np.stack(some)).double()))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def intervals(found: dict[str, Tensor], num_images: int = 0, least: float = 0.0) -> Intervals:
    """Percentile intervals of (R,) values each; a resample in which a figure has no value (NaN) is left out.

    With the number n of images, few are allowed for. Where all resamples are equal, as at 0% or 100%, a share x of all
    images may be otherwise though none of these is, (1 - x)ⁿ = 0.025 (Clopper and Pearson 1934): the interval reaches
    as far as they could take a figure from ``least`` to 1. Of less than 6 values not even the whole range holds their
    median in 95 of 100 sets, as 2 · 0.5ⁿ are all on one side of it: ranks then have no interval.
    """
    tail, bounds = (1 - LEVEL) / 2, Intervals()
    for name, values in found.items():
        is_rank = "rank" in name
        if values.isnan().all() or (is_rank and num_images and 2 * 0.5**num_images > 1 - LEVEL):
            continue
        low, high = np.nanquantile(values.numpy(), (tail, 1 - tail)).tolist()
        if low == high and num_images and not is_rank:
            unseen = 1 - tail ** (1 / num_images)
            low, high = low - unseen * (low - least), high + unseen * (1 - high)
        bounds[name] = [low, high]
    return bounds


def num_scored(result: Any, members: Tensor) -> int:
    """How many of the images, places in N, a result scores: of retrieval those with captions."""
    return int(torch.isin(members, result.queries[0].images).sum()) if isinstance(result, Retrieval) else len(members)


def scored(results: Iterable[Any]) -> list[Any]:
    """Those of the results whose figures have intervals."""
    return [one for one in results if isinstance(one, Retrieval | ZeroShot) or hasattr(one, "resampled")]


def with_intervals(result: Any) -> Any:
    """A result with the intervals of its figures, over all its images, where it can have them."""
    if not scored([result]):
        return result
    members = torch.arange(result.num_images)
    return replace(result, intervals=intervals(replicates(result, members), num_scored(result, members)))


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


def ratios(parts: Tensor, wholes: Tensor) -> Tensor:
    """Resamples of Σ parts / Σ wholes over images, of (N, K) float64 each: (R, K), NaN where the whole is 0."""
    drawn, found = _draws(np.arange(len(parts)), len(parts)), list[Tensor]()
    while some := list(islice(drawn, max(1, HELD // len(parts)))):
        times = torch.from_numpy(np.stack(some)).double()
        found.append((times @ parts) / (times @ wholes))
    return torch.cat(found)
