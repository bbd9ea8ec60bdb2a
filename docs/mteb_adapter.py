"""A model of train-clip for mteb 2 and its image benchmarks (MIEB): ``mteb.evaluate(Encoder(MODEL), tasks)``.

``pip install mteb``; the package itself does not need it. To be copied and changed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

import train_clip


class Encoder:
    """mteb's ``EncoderProtocol``: images, texts, or both of an item, whose embeddings are added.

    Args:
        model_name: whatever ``train_clip.load`` reads.
        revision: what results are filed under.
        device: where the model computes; by default on a GPU if there is one.
    """

    def __init__(self, model_name: str, revision: str | None = None, device: str | None = None, **_: Any) -> None:
        self.model = train_clip.load(model_name, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model_name, self.revision = model_name, revision

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, batch_size: int = 64, **_: Any) -> np.ndarray:
        """Embed batches that have ``image``, a list of pictures, ``text``, a list of strings, or both: (N, D) float32.

        The task, its split and its prompts, by keyword, make no difference.
        """
        parts = []
        for batch in inputs:
            sides = [list(batch[side]) for side in ("image", "text") if side in batch]
            parts.append(np.sum([self.model.encode(side, batch_size=batch_size) for side in sides], axis=0))
        return np.concatenate(parts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine of each with each, (N, M)."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine of the first with the first, the second with the second, …: (N,)."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files the results under."""
        from mteb.models.model_meta import ModelMeta

        name = f"train-clip/{self.model_name.strip('/').replace('/', '-')}"
        return ModelMeta.create_empty({"name": name, "revision": self.revision or "local"})


def _unit(embeddings: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings)).float(), dim=-1)
