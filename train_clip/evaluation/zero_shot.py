"""Zero-shot classification (CLIP paper, section 3.1): a class is the mean of its captions' embeddings.

N  images      C  classes      T  templates      D  embedding width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # CLIP paper, section 3.1.4


@dataclass(frozen=True)
class ZeroShot:
    """Shares in [0, 1].

    Args:
        top1: images whose most similar class is theirs.
        top5: images whose class is among the five most similar.
        mean_per_class: top-1 of each class, averaged over the classes that have images.
        chance: top-1 of a guess, 1 / C.
        num_images: N.
        num_classes: C.
    """

    top1: float
    top5: float
    mean_per_class: float
    chance: float
    num_images: int
    num_classes: int


def class_embeddings(
    classes: Sequence[str], templates: Sequence[str], embed_texts: Callable[[list[str]], Tensor]
) -> Tensor:
    """Each template is encoded and normalised, then averaged over the templates, then normalised again.

    Args:
        classes: C names.
        templates: T sentences with ``{}`` where the name goes.
        embed_texts: maps strings to (n, D) unit-norm embeddings.

    Returns:
        (C, D) float, unit norm.
    """
    captions = [template.replace("{}", name) for name in classes for template in templates]
    embeddings = embed_texts(captions).unflatten(0, (len(classes), len(templates)))
    return F.normalize(embeddings.mean(dim=1), dim=-1)


def zero_shot(images: Tensor, labels: Tensor, classes: Tensor) -> ZeroShot:
    """Score images against classes. Ties and NaN count against.

    Args:
        images: (N, D) float, unit norm.
        labels: (N,) int64 in [0, C).
        classes: (C, D) float, unit norm.
    """
    similarity = images @ classes.T
    own = similarity.gather(1, labels[:, None])
    # The class itself is the one entry that is never less similar than itself.
    # On the CPU: some devices (MPS) have no float64.
    ranks, labels = ((~(similarity < own)).sum(dim=1) - 1).cpu(), labels.cpu()
    hits = (ranks < 1).double()
    counts = torch.bincount(labels, minlength=len(classes)).double()
    per_class = torch.zeros_like(counts).index_add_(0, labels, hits)[counts > 0] / counts[counts > 0]
    return ZeroShot(
        top1=hits.mean().item(),
        top5=(ranks < 5).double().mean().item(),
        mean_per_class=per_class.mean().item(),
        chance=1 / len(classes),
        num_images=len(images),
        num_classes=len(classes),
    )
