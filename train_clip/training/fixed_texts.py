"""Embeddings of captions by a text tower that does not change: each caption is encoded once, not at every step.

B  captions of a batch      N  different captions so far      D  embedding width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train_clip.models.dual_encoder import Texts


class FixedTexts:
    """A table of embeddings in the machine's memory, 4 D bytes a caption, that fills as captions come by.

    A caption that is encoded among others differs by rounding: what a run computes after it was resumed equals what it
    would have computed to within that.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._table = torch.empty(0, 0)

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def embed(self, ids: Tensor, texts: Texts, encode: Callable[[Texts], Tensor]) -> Tensor:
        """Look captions up; encode those that were not met before.

        Args:
            ids: (B,) int64, equal for equal captions.
            texts: their tokens.
            encode: maps tokens of b captions to (b, D) float32.

        Returns:
            (B, D) float32, on the device of the ids.
        """
        keys = ids.tolist()
        unknown = {key: place for place, key in enumerate(keys) if key not in self._rows}
        if unknown:
            self._add(list(unknown), encode(_take(texts, torch.tensor(list(unknown.values()), device=ids.device))))
        return self._table[[self._rows[key] for key in keys]].to(ids.device)

    def _add(self, keys: list[int], embeddings: Tensor) -> None:
        """Append rows; the table doubles where it is full, so that none is copied often."""
        used, needed = len(self._rows), len(self._rows) + len(keys)
        if needed > len(self._table):
            larger = torch.empty(max(needed, 2 * len(self._table)), embeddings.shape[1])
            larger[:used] = self._table[:used] if used else larger[:0]
            self._table = larger
        self._table[used:needed] = embeddings.cpu()
        self._rows |= {key: used + place for place, key in enumerate(keys)}


def _take(texts: Texts, places: Tensor) -> Texts:
    if isinstance(texts, Mapping):
        return {name: tensor[places] for name, tensor in texts.items()}
    return texts[places]
