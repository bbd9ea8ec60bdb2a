"""Images alone, for scoring: the centre crop of each, in order, without substitutes.

S  side of the square in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train_clip.data.pixels import kind_of, read_square
from train_clip.data.transforms import center_crop
from train_clip.errors import BadSample
from train_clip.types import Skip


class ImageList(Dataset["tuple[int, Tensor | Skip]"]):
    """The pixels of each file, or why it cannot be read.

    Args:
        paths: images, or ``.npz`` files of them.
        size: S.

    Raises:
        UserError: here or when one is read, arrays that do not fit: see ``read_square`` and ``PixelKind``.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths = paths
        self.size = size
        self.kind = kind_of(paths, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skip]:
        """The index with (3, S, S) pixels, or with what is wrong with the file."""
        path = self.paths[index]
        try:
            return index, self.kind.require(read_square(path, self.size, partial(center_crop, size=self.size)), path)
        except BadSample as bad:
            return index, Skip(bad.path, bad.reason)


def image_loader(paths: Sequence[str], size: int, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Load images in batches of (indices, (B, 3, S, S) pixels, skips); bad files are in the skips alone."""
    return DataLoader(ImageList(paths, size), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)


def _collate(samples: list[tuple[int, Tensor | Skip]]) -> tuple[list[int], Tensor, list[Skip]]:
    good = [(index, pixels) for index, pixels in samples if isinstance(pixels, Tensor)]
    skips = [skip for _, skip in samples if isinstance(skip, Skip)]
    pixels = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0)
    return [index for index, _ in good], pixels, skips
