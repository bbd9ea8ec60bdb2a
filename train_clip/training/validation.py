"""Scores the validation split as a whole: the result is the same for any number of processes."""

import torch
from torch import Tensor

from train_clip import gather, losses
from train_clip.evaluation.retrieval import retrieval


class ValidationSplit:
    """Collects embeddings of width D batch by batch; ``score`` gathers them and starts afresh."""

    def __init__(self, embed_dim: int, loss: losses.Loss = losses.softmax.SOFTMAX) -> None:
        self._embed_dim, self._loss = embed_dim, loss
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, images: Tensor, texts: Tensor, captions: Tensor, missing: tuple[int, ...] = ()) -> None:
        """Add one process's batch of unit norm, (n, D) float, and (n,) int64, equal for equal captions.

        Rows that are ``missing`` only hold a place, for pairs that could not be read; they are not scored.
        """
        present = torch.ones(len(images), dtype=torch.bool, device=images.device)
        present[list(missing)] = False
        self._batches.append((images, texts, captions, present))

    def score(self, scale: Tensor, dataset: object = None, bias: Tensor | None = None) -> dict[str, float]:
        """Compute the loss and recalls of everything that was added on all processes, and forget it.

        ``val/loss`` is over global batches as large as the first, the remainder weighted by its size, and
        ``val/loss_above_floor`` what it is above the least that equal captions leave possible. A sampler's repetitions
        are dropped where the data set has a length. The scale is exp of the learned temperature.
        """
        batch = gather.largest([len(self._batches[0][0]) if self._batches else 0])[0] * gather.world()[1]
        total = len(dataset) if hasattr(dataset, "__len__") else None
        # A process may have had no batch at all, and must gather with the others all the same.
        dtype = torch.promote_types(scale.dtype, torch.float32)
        none = torch.empty(0, self._embed_dim, dtype=dtype, device=scale.device)
        columns = zip((none, none, none[:, 0].long(), none[:, 0].bool()), *self._batches, strict=True)
        images, texts, captions, present = (interleave(gather.gather_all(torch.cat(parts)), total) for parts in columns)
        self._batches = []
        images, texts, captions = images[present], texts[present], captions[present]
        if not len(images):
            return {}
        loss = floor = 0.0
        for rows, columns, groups in zip(images.split(batch), texts.split(batch), captions.split(batch), strict=True):
            pairs = losses.Pairs(rows, columns, rows, columns)
            loss += self._loss.of(pairs, scale.float(), bias, False).item() * len(rows)
            floor += self._loss.floor(groups).item() * len(rows)
        loss, floor = loss / len(images), floor / len(images)
        found = retrieval(images, texts, torch.arange(len(images), device=images.device), captions)
        ways = {
            "R@{}_image_to_text": found.image_to_text,
            "R@{}_text_to_image": found.text_to_image,
            "chance_R@{}_image_to_text": found.chance_image_to_text,
            "chance_R@{}_text_to_image": found.chance_text_to_image,
        }
        shares = {f"val/{way.format(k)}": share for way, by_k in ways.items() for k, share in by_k.items()}
        both = *found.image_to_text.values(), *found.text_to_image.values()
        losses_found = {"val/loss": loss, "val/loss_above_floor": loss - floor}
        return losses_found | shares | {"val/mean_recall": sum(both) / len(both)}


def interleave(parts: list[Tensor], total: int | None) -> Tensor:
    """Undo a ``DistributedSampler``: process r of W holds rows r, r + W, r + 2W, … of the split's ``total``.

    Parts of unequal length come from no such sampler and are joined as they are.
    """
    if len({len(part) for part in parts}) > 1:
        return torch.cat(parts)
    joined = torch.stack(parts, dim=1).flatten(0, 1)
    # A sampler pads by less than one row a process; more are left where the loader was not shared out at all.
    padded = total is not None and 0 < len(joined) - total < len(parts)
    return joined[:total] if padded else joined
