"""Retrieval: how often the correct one is among the k most similar, in both directions, and its median rank.

N  images      M  captions      D  embedding width      U  different captions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train_clip.evaluation.embed import Collection
from train_clip.losses.softmax import ranks
from train_clip.losses.tiles import tiles
from train_clip.printing import Intervals, interval

KS = (1, 5, 10)  # CLIP paper, table 13
WAYS = "i→t", "t→i"  # in the names of figures


class Queries(NamedTuple):
    """Those of one direction."""

    images: Tensor  # (Q,) int64, the image that the query is, or is a caption of
    ranks: Tensor  # (Q,) int64 from 1: the place of the best correct candidate


@dataclass(frozen=True)
class Retrieval:
    """Recall at each k, in [0, 1], and chance level; the median rank of the best correct one, from 1."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]
    median_rank: dict[str, float] = field(default_factory=dict)  # of both ways
    intervals: Intervals = field(default_factory=dict)
    queries: Sequence[Queries] = field(default=(), compare=False, repr=False)  # of both ways
    num_images: int = field(default=0, compare=False, repr=False)  # with those that have no captions

    def rows(self) -> list[list[str]] | str:
        """A heading and a row for each k, to be printed."""
        if not (ks := sorted(self.image_to_text.keys() | self.text_to_image.keys())):
            return "retrieval: not scored, since every caption is correct for every image"
        heading = ["retrieval", "image → text", "95% interval", "chance", "text → image", "95% interval", "chance"]
        rows, last = [[f"R@{k}"] for k in ks], ["median rank"]
        recalls = (self.image_to_text, self.chance_image_to_text), (self.text_to_image, self.chance_text_to_image)
        for (way, median), (recall, chance) in zip(self.median_rank.items(), recalls, strict=True):
            for row, k in zip(rows, ks, strict=True):
                share, guess = (f"{one[k]:.1%}" if k in one else "" for one in (recall, chance))
                row += [share, interval(self.intervals.get(f"R@{k} {way}")), guess]
            last += [f"{median:,.1f}", interval(self.intervals.get(f"median rank {way}"), "{:,.1f}"), ""]
        return [heading, *rows, last]

    def figures(self) -> dict[str, float]:
        """The scores to compare with other models."""
        both = zip(WAYS, (self.image_to_text, self.text_to_image), strict=True)
        return {f"R@{k} {way}": share for way, recall in both for k, share in recall.items()}


def score_captions(collection: Collection) -> Retrieval | None:
    """Score the collection's images against its captions, where it has any, at each k at which a guess can miss."""
    if not collection.captions:
        return None
    device = collection.images.device
    # An image whose captions could not be read has nothing to be found by.
    described, owners = torch.unique(torch.tensor(collection.owners, device=device), return_inverse=True)
    images = collection.images if len(described) == len(collection.images) else collection.images[described]
    found = retrieval(images, collection.texts, owners, collection.caption_ids)
    # What every guess finds, as with k at the number of candidates, is no score.
    chances = found.chance_image_to_text, found.chance_text_to_image
    kept = zip((found.image_to_text, found.text_to_image, *chances), chances * 2, strict=True)
    to_text, to_image, by_text, by_image = (
        {k: share for k, share in shares.items() if chance[k] < 1} for shares, chance in kept
    )
    queries = [Queries(described.cpu()[one.images], one.ranks) for one in found.queries]
    return Retrieval(
        to_text, to_image, by_text, by_image, found.median_rank, queries=queries, num_images=len(collection.images)
    )


def retrieval(images: Tensor, texts: Tensor, owners: Tensor, caption_ids: Tensor, ks: Sequence[int] = KS) -> Retrieval:
    """Score every image against every caption.

    An image counts as found when any caption that says the same as one of its own is among the first k, a caption when
    any image that has it is. Ties and NaN count against (``ranks``): a model that maps all to one point finds nothing.

    Images are (N, D), texts (M, D), of unit norm; ``owners``, (M,), are the captions' images, and ``caption_ids``,
    (M,), are equal for equal captions.
    """
    different, ids = torch.unique(caption_ids, return_inverse=True)
    places = torch.arange(len(images), device=images.device)
    # The owner and the number of each caption, in the order of either: an image's captions, a caption's images.
    (by_owner, of_owner), (by_id, of_id) = (
        (one[order := one.argsort()], other[order]) for one, other in ((owners, ids), (ids, owners))
    )
    to_text, chance_of_text, of_images = _search(
        images, texts, ks, lambda at: _related(places[at], by_owner, of_owner, len(different))[:, ids]
    )
    to_image, chance_of_image, of_texts = _search(
        texts, images, ks, lambda at: _related(ids[at], by_id, of_id, len(images))
    )
    queries = [Queries(places.cpu(), of_images), Queries(owners.cpu(), of_texts)]
    medians = {way: float(np.median(one.ranks.numpy())) for way, one in zip(WAYS, queries, strict=True)}
    found = to_text, to_image, chance_of_text, chance_of_image, medians
    return Retrieval(*found, queries=queries, num_images=len(images))


def _search(
    queries: Tensor, candidates: Tensor, ks: Sequence[int], right: Callable[[slice], Tensor]
) -> tuple[dict[int, float], dict[int, float], Tensor]:
    """Recall and chance at each k, and ranks; ``right`` tells for some of the queries which candidates are right."""
    found, matches = torch.empty(2, len(queries), dtype=torch.int64)
    for rows in tiles(len(queries), len(candidates)):
        table = right(rows)
        found[rows], matches[rows] = ranks(queries[rows], candidates, table), table.sum(dim=1)
    # On the CPU: some devices (MPS) have no float64.
    recall = {k: (found < k).double().mean().item() for k in ks}
    # 1 - C(candidates - matches, k) / C(candidates, k), averaged over the queries.
    number = len(candidates)
    drawn = torch.arange(min(max(ks), number), dtype=torch.float64)
    wrong = number - matches.double()[:, None]
    missed = ((wrong - drawn) / (number - drawn)).clamp(min=0).cumprod(dim=1)
    return recall, {k: (1 - missed[:, min(k, number) - 1]).mean().item() for k in ks}, found + 1


def _related(wanted: Tensor, left: Tensor, right: Tensor, size: int) -> Tensor:
    """(n, size) bool: to which right ones each wanted left one is related, by the pairs of sorted left and right."""
    table = torch.zeros(len(wanted), size, dtype=torch.bool, device=wanted.device)
    starts, ends = (torch.searchsorted(left, wanted, right=after) for after in (False, True))
    numbers = ends - starts
    rows = torch.arange(len(wanted), device=wanted.device).repeat_interleave(numbers)
    # A row's pairs stand one after the other, from its start on.
    pairs = torch.arange(len(rows), device=wanted.device) + (starts - numbers.cumsum(0) + numbers)[rows]
    table[rows, right[pairs]] = True
    return table
