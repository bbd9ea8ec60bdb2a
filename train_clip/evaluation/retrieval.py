"""Retrieval: how often the correct one is among the k most similar, in both directions.

N  images      M  captions      D  embedding width      U  different captions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train_clip.evaluation.embed import Collection
from train_clip.losses.softmax import ranks

KS = (1, 5, 10)  # CLIP paper, table 13
ROWS_AT_ONCE = 1024  # bounds memory to this many rows of similarities


@dataclass(frozen=True)
class Retrieval:
    """Recall at each k, in [0, 1], and chance level."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]

    def rows(self) -> list[list[str]]:
        """A heading and a row for each k, to be printed."""
        columns = self.image_to_text, self.chance_image_to_text, self.text_to_image, self.chance_text_to_image
        heading = ["retrieval", "image → text", "chance", "text → image", "chance"]
        return [heading, *([f"R@{k}", *(f"{column[k]:.1%}" for column in columns)] for k in self.image_to_text)]

    def figures(self) -> dict[str, float]:
        """The scores to compare with other models."""
        both = {"i→t": self.image_to_text, "t→i": self.text_to_image}
        return {f"R@{k} {way}": share for way, recall in both.items() for k, share in recall.items()}


def score_captions(collection: Collection) -> Retrieval | None:
    """Score the collection's images against its captions, where it has any."""
    if not collection.captions:
        return None
    device = collection.images.device
    places = {caption: place for place, caption in enumerate(collection.captions)}
    ids = torch.tensor([places[caption] for caption in collection.captions], device=device)
    # An image whose captions could not be read has nothing to be found by.
    described, owners = torch.unique(torch.tensor(collection.owners, device=device), return_inverse=True)
    return retrieval(collection.images[described], collection.texts, owners, ids)


def retrieval(images: Tensor, texts: Tensor, owners: Tensor, caption_ids: Tensor, ks: Sequence[int] = KS) -> Retrieval:
    """Score every image against every caption.

    An image counts as found when any caption that says the same as one of its own is among the first k, a caption when
    any image that has it is. Ties and NaN count against (``ranks``): a model that maps all to one point finds nothing.

    Images are (N, D), texts (M, D), of unit norm; ``owners``, (M,), are the captions' images, and ``caption_ids``,
    (M,), are equal for equal captions.
    """
    different, ids = torch.unique(caption_ids, return_inverse=True)
    places = torch.arange(len(images), device=images.device)
    to_text, chance_of_text = _search(
        images, texts, ks, lambda at: _related(places[at], owners, ids, len(different))[:, ids]
    )
    to_image, chance_of_image = _search(texts, images, ks, lambda at: _related(ids[at], ids, owners, len(images)))
    return Retrieval(to_text, to_image, chance_of_text, chance_of_image)


def _search(
    queries: Tensor, candidates: Tensor, ks: Sequence[int], right: Callable[[slice], Tensor]
) -> tuple[dict[int, float], dict[int, float]]:
    """Recall and chance at each k; ``right`` tells for some of the queries which candidates are right."""
    found, matches = [], []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        table = right(rows)
        found.append(ranks(queries[rows], candidates, table).cpu())
        matches.append(table.sum(dim=1).cpu())
    # On the CPU: some devices (MPS) have no float64.
    recall = {k: (torch.cat(found) < k).double().mean().item() for k in ks}
    # 1 - C(candidates - matches, k) / C(candidates, k), averaged over the queries.
    number = len(candidates)
    drawn = torch.arange(min(max(ks), number), dtype=torch.float64)
    wrong = number - torch.cat(matches).double()[:, None]
    missed = ((wrong - drawn) / (number - drawn)).clamp(min=0).cumprod(dim=1)
    return recall, {k: (1 - missed[:, min(k, number) - 1]).mean().item() for k in ks}


def _related(wanted: Tensor, left: Tensor, right: Tensor, size: int) -> Tensor:
    """(n, size) bool: to which right ones each wanted left one is related, by the pairs of left and right."""
    table = torch.zeros(len(wanted), size, dtype=torch.bool, device=wanted.device)
    rows, pairs = (wanted[:, None] == left).nonzero(as_tuple=True)
    table[rows, right[pairs]] = True
    return table
