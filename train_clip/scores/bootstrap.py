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

from train_clip.evaluation.retrieval import Retrieval
from train_clip.evaluation.zero_shot import PREFIX, ZeroShot
from train_clip.printing import Intervals

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
HELD = 2**22  # numbers that are held at a time, or those of one resample


def resampled(result: Any, weights: Tensor) -> dict[str, Tensor]:
    """The figures of resamples, (r,) each; (r, N) float64 weights say how often each image is drawn."""
    if isinstance(result, Retrieval):
        found = dict[str, Tensor]()
        for query, recall in zip(result.queries, (result.image_to_text, result.text_to_image), strict=True):
            drawn = weights[:, query.images]
            shares = {f"R@{k} {query.way}": drawn @ (query.ranks <= k).double() / drawn.sum(dim=1) for k in recall}
            found |= shares | {f"median rank {query.way}": median(query.ranks, drawn)}
        return found
    if isinstance(result, ZeroShot):
        before, labels = result.images
        right = weights * (before < 1)
        none = torch.zeros(len(weights), result.num_classes, dtype=weights.dtype)
        of_class = none.index_add(1, labels, right) / none.index_add(1, labels, weights)
        top1, top5 = ((weights * (before < k)).sum(dim=1) / weights.sum(dim=1) for k in (1, 5))
        shares = {"top-1": top1, "top-5": top5, "mean per class": of_class.nanmean(dim=1)}
        return {name: shares[name.removeprefix(PREFIX)] for name in result.figures()}
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


def intervals(found: dict[str, Tensor]) -> Intervals:
    """Percentile intervals of (R,) values each; a resample in which a figure has no value (NaN) is left out."""
    bounds = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    return {
        name: np.nanquantile(values.numpy(), bounds).tolist()
        for name, values in found.items()
        if not values.isnan().all()
    }


def scored(results: Iterable[Any]) -> list[Any]:
    """Those of the results whose figures have intervals."""
    return [one for one in results if isinstance(one, Retrieval | ZeroShot) or hasattr(one, "resampled")]


def with_intervals(result: Any) -> Any:
    """A result with the intervals of its figures, over all its images, where it can have them."""
    if not scored([result]):
        return result
    return replace(result, intervals=intervals(replicates(result, torch.arange(result.num_images))))


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
