"""Average precision where images have several classes, and its mean over the classes (mAP).

N  images      C  classes      D  embedding width      R  resamples
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from train_clip.evaluation.embed import Collection
from train_clip.evaluation.zero_shot import class_embeddings
from train_clip.printing import Intervals, interval

FIGURE = "multi-label mAP"


@dataclass(frozen=True)
class MultiLabel:
    """Average precisions in [0, 1], of classes that some images have and some have not; equal scores are one step."""

    mean: float | None  # None where there is no such class
    chance: float | None  # mean over the classes of what a random order scores
    per_class: dict[str, float]
    num_images: int
    num_classes: int
    intervals: Intervals = field(default_factory=dict)
    scored: tuple[Tensor, Tensor] = field(default=(torch.empty(0), torch.empty(0)), compare=False, repr=False)

    def rows(self) -> str:
        """A line to be printed."""
        if self.mean is None or self.chance is None:
            return "multi-label: not scored, since each class is in all of the images or in none"
        return (
            f"multi-label over {len(self.per_class):,} of {self.num_classes:,} classes: mAP {self.mean:.1%} "
            f"{interval(self.intervals.get(FIGURE))} (chance {self.chance:.1%})"
        )

    def figures(self) -> dict[str, float]:
        """The scores to compare with other models."""
        return {} if self.mean is None else {FIGURE: self.mean}

    def resampled(self, weights: Tensor) -> dict[str, Tensor]:
        """The mean of resamples, (r,); (r, N) float64 weights say how often each image is drawn."""
        if self.mean is None:
            return {}
        similarity, right = self.scored
        sums, numbers = torch.zeros(2, len(weights), dtype=weights.dtype)
        for scores, hits in zip(similarity.T, right.T, strict=True):
            precision = average_precision(scores, hits, weights)
            sums, numbers = sums + precision.nan_to_num(0), numbers + ~precision.isnan()
        return {FIGURE: sums / numbers}


def score_label_sets(collection: Collection) -> MultiLabel | None:
    """Score the collection's images against its classes, where some of them have several."""
    if not collection.label_sets:
        return None
    classes = class_embeddings(collection.classes, collection.templates, collection.embed_texts)
    right = torch.zeros(len(collection.images), len(classes), dtype=torch.bool)
    for row, labels in enumerate(collection.label_sets):
        right[row, labels] = True
    return multi_label(collection.images, right, classes, collection.classes)


def multi_label(images: Tensor, right: Tensor, classes: Tensor, names: list[str]) -> MultiLabel:
    """Score (N, D) images against (C, D) classes, of unit norm; (N, C) bool says which images have which classes."""
    number = right.sum(dim=0)
    # All images have a class, or none has: every order of them is as good.
    told = [place for place in range(len(classes)) if 0 < number[place] < len(images)]
    similarity, right = (images.to(classes.dtype) @ classes[told].T).cpu(), right[:, told]
    once = torch.ones(1, len(images), dtype=torch.float64)
    precisions = [average_precision(*one, once).item() for one in zip(similarity.T, right.T, strict=True)]
    return MultiLabel(
        mean=sum(precisions) / len(told) if told else None,
        chance=chance(number[told].double(), len(images)).mean().item() if told else None,
        per_class=dict(zip((names[place] for place in told), precisions, strict=True)),
        num_images=len(images),
        num_classes=len(classes),
        scored=(similarity, right),
    )


def average_precision(scores: Tensor, hits: Tensor, weights: Tensor) -> Tensor:
    """Mean of the precision at each hit, all images of one score counted at once: (r,) float64, NaN without hits.

    Of (N,) scores and (N,) bool hits, each as often as (r, N) float64 weights say.
    """
    scores, order = scores.sort(descending=True)
    weights, hits = weights[:, order], hits[order].nonzero().flatten()
    # The last place of each hit's score, and of all hits the last one up to there.
    ends = torch.searchsorted(-scores, -scores[hits], right=True) - 1
    last = torch.searchsorted(hits, ends, right=True) - 1
    own, all_so_far = weights[:, hits], weights.cumsum(dim=1)[:, ends]
    precision = (own.cumsum(dim=1)[:, last] / all_so_far).nan_to_num(0)
    return (own * precision).sum(dim=1) / own.sum(dim=1)


def chance(hits: Tensor, number: int) -> Tensor:
    """Mean over all orders of so many images of the average precision of so many hits, (C,) float64.

        E[AP] = (m - 1) / (n - 1) · (1 - H_n / n) + H_n / n            H_n = 1 + 1/2 + … + 1/n

    At rank i a hit has (i - 1)(m - 1) / (n - 1) others before it, and i is any rank.
    """
    first = (1 / torch.arange(1, number + 1, dtype=torch.float64)).mean()
    return (hits - 1) / max(1, number - 1) * (1 - first) + first
