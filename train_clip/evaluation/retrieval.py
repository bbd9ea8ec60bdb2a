"""Retrieval: how often the correct one is among the k most similar, in both directions.

N  images      M  captions      D  embedding width      U  different captions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train_clip.evaluation.embed import Collection
from train_clip.losses.softmax import ranks
from train_clip.losses.tiles import tiles

KS = (1, 5, 10)  # CLIP paper, table 13


@dataclass(frozen=True)
class Retrieval:
    """Recall at each k, in [0, 1], and chance level."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]

    def rows(self) -> list[list[str]] | str:
        """A heading and a row for each k, to be printed."""
        columns = self.image_to_text, self.chance_image_to_text, self.text_to_image, self.chance_text_to_image
        heading = ["retrieval", "image → text", "chance", "text → image", "chance"]
        if not (ks := sorted(self.image_to_text.keys() | self.text_to_image.keys())):
            return "retrieval: not scored, since every caption is correct for every image"
        return [heading, *([f"R@{k}", *(f"{column[k]:.1%}" if k in column else "" for column in columns)] for k in ks)]

    def figures(self) -> dict[str, float]:
        """The scores to compare with other models."""
        both = {"i→t": self.image_to_text, "t→i": self.text_to_image}
        return {f"R@{k} {way}": share for way, recall in both.items() for k, share in recall.items()}


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
    return Retrieval(*({k: share for k, share in shares.items() if chance[k] < 1} for shares, chance in kept))


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
    to_text, chance_of_text = _search(
        images, texts, ks, lambda at: _related(places[at], by_owner, of_owner, len(different))[:, ids]
    )
    to_image, chance_of_image = _search(texts, images, ks, lambda at: _related(ids[at], by_id, of_id, len(images)))
    return Retrieval(to_text, to_image, chance_of_text, chance_of_image)


def _search(
    queries: Tensor, candidates: Tensor, ks: Sequence[int], right: Callable[[slice], Tensor]
) -> tuple[dict[int, float], dict[int, float]]:
    """Recall and chance at each k; ``right`` tells for some of the queries which candidates are right."""
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
    return recall, {k: (1 - missed[:, min(k, number) - 1]).mean().item() for k in ks}


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
