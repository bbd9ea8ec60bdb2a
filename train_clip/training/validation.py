"""The validation split, scored as a whole: the figures are one process's whatever the number of processes.

n  rows of one process's batch      N  pairs of the split      D  embedding width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from train_clip.evaluation.retrieval import retrieval
from train_clip.gather import gather_all, world
from train_clip.losses import Loss, Pairs
from train_clip.losses.softmax import SOFTMAX


class ValidationSplit:
    """Collects embeddings batch by batch; ``score`` gathers them and starts afresh.

    Args:
        embed_dim: D.
        loss: the one that is trained.
    """

    def __init__(self, embed_dim: int, loss: Loss = SOFTMAX) -> None:
        self._embed_dim = embed_dim
        self._loss = loss
        self._batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, images: Tensor, texts: Tensor, captions: Tensor, missing: Sequence[int] = ()) -> None:
        """Add one process's batch.

        Args:
            images: (n, D) float, unit norm.
            texts: (n, D) float, unit norm.
            captions: (n,) int64, equal for equal captions.
            missing: rows that only hold a place, for pairs that could not be read; they are not scored.
        """
        present = torch.ones(len(images), dtype=torch.bool, device=images.device)
        present[list(missing)] = False
        self._batches.append((images, texts, captions, present))

    def score(self, scale: Tensor, dataset: Any = None, bias: Tensor | None = None) -> dict[str, float]:
        """Compute the loss and recalls of everything that was added on all processes, and forget it.

        Args:
            scale: () float, exp of the learned temperature.
            dataset: what the loader read; where it has a length, repetitions that a sampler added to even out the
                processes are dropped.
            bias: () float, where the loss has one.

        Returns:
            ``val/loss``, over global batches as large as the first, the remainder weighted by its size;
            ``val/loss_above_floor``, what it is above the least that equal captions leave possible;
            ``val/R@k_…`` both ways for k = 1, 5, 10; and ``val/mean_recall``, the mean of those six.
        """
        first = torch.tensor([len(self._batches[0][0]) if self._batches else 0], device=scale.device)
        batch = int(torch.cat(gather_all(first)).max()) * world()[1]
        total = len(dataset) if hasattr(dataset, "__len__") else None
        # A process may have had no batch at all, and must gather with the others all the same.
        dtype = torch.promote_types(scale.dtype, torch.float32)
        none = torch.empty(0, self._embed_dim, dtype=dtype, device=scale.device)
        columns = zip((none, none, none[:, 0].long(), none[:, 0].bool()), *self._batches, strict=True)
        images, texts, captions, present = (interleave(gather_all(torch.cat(parts)), total) for parts in columns)
        self._batches = []
        images, texts, captions = images[present], texts[present], captions[present]
        if not len(images):
            return {}
        found = retrieval(images, texts, torch.arange(len(texts), device=texts.device), captions)
        loss = loss_in_batches(images, texts, lambda pairs: self._loss.of(pairs, scale.float(), bias, False), batch)
        floor = sum(self._loss.floor(part).item() * len(part) for part in captions.split(batch)) / len(captions)
        figures = {"val/loss": loss, "val/loss_above_floor": loss - floor}
        for k in found.image_to_text:
            figures[f"val/R@{k}_image_to_text"] = found.image_to_text[k]
            figures[f"val/R@{k}_text_to_image"] = found.text_to_image[k]
        recalls = [*found.image_to_text.values(), *found.text_to_image.values()]
        return figures | {"val/mean_recall": sum(recalls) / len(recalls)}


def loss_in_batches(images: Tensor, texts: Tensor, loss: Callable[[Pairs], Tensor], batch: int) -> float:
    """Mean over all pairs of their loss among the pairs of their batch.

    Args:
        images: (N, D) float, unit norm.
        texts: (N, D) float, unit norm.
        loss: of a batch.
        batch: pairs of a global batch; the last may hold fewer.
    """
    total = 0.0
    for own_images, own_texts in zip(images.split(batch), texts.split(batch), strict=True):
        pairs = Pairs(own_images, own_texts, own_images, own_texts)
        total += loss(pairs).item() * len(own_images)
    return total / len(images)


def interleave(parts: list[Tensor], total: int | None) -> Tensor:
    """Undo a ``DistributedSampler``: process r of W holds rows r, r + W, r + 2W, … of the split.

    Args:
        parts: one tensor a process.
        total: rows of the split; what follows them is a sampler's padding. None where it is unknown.

    Returns:
        (N, …) in the split's order. Parts of unequal length come from no such sampler and are joined as they are.
    """
    if len({len(part) for part in parts}) > 1:
        return torch.cat(parts)
    joined = torch.stack(parts, dim=1).flatten(0, 1)
    # A sampler pads by less than one row a process; more are left where the loader was not shared out at all.
    padded = total is not None and 0 < len(joined) - total < len(parts)
    return joined[:total] if padded else joined
