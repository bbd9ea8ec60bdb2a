"""Images → arrays beside them that training reads in their place: decoded and resized once, not once an epoch.

An array holds the whole picture, its shorter side the model's size. What every crop of an image does first is done, and
the crop itself is still to be drawn.

S  side of the model's square in pixels
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from train_clip.data.images import open_rgb
from train_clip.data.npz import read_header, write_array
from train_clip.data.pairing import cache_name
from train_clip.data.pairs import FlatStrings
from train_clip.data.pixels import NORMALISED
from train_clip.data.reading import reading
from train_clip.data.transforms import resize_shorter, to_tensor
from train_clip.errors import BadSample, UserError
from train_clip.types import Skip

BATCH = 16  # images that a worker does at a time


class Cached(NamedTuple):
    """What became of an image.

    Args:
        image_bytes: of its file.
        cache_bytes: of its array's; 0 where there is none.
        written: whether the array was written, and not there before.
        bad: why there is no array.
    """

    image_bytes: int = 0
    cache_bytes: int = 0
    written: bool = False
    bad: Skip | None = None


class ImagesToCache(Dataset[Cached]):
    """Images of a folder, each made an array when it is asked for.

    Args:
        folder: below which ``npz/`` is.
        images: their names, POSIX paths below the folder.
        size: S.

    Raises:
        UserError: arrays of two images would have one name; or, from an item, what has that name already was not made
            here and is not to be replaced.
    """

    def __init__(self, folder: Path, images: FlatStrings, size: int) -> None:
        self.folder, self.images, self.size = folder, images, size
        _require_own_names(folder, images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Cached:
        """Write the array of image ``index``, unless it is there, newer than its image and of the right size."""
        image, array = self.folder / self.images[index], self.folder / cache_name(self.images[index])
        try:
            with reading(str(image), "image"):
                found = image.stat()
            written = not self._is_there(image, found.st_mtime_ns, array)
            if written:
                _write(array, to_tensor(resize_shorter(open_rgb(str(image)), self.size)).numpy())
        except BadSample as bad:
            # An earlier array of the image would hide from training that it can no longer be read.
            array.unlink(missing_ok=True)
            return Cached(bad=Skip(bad.path, bad.reason))
        return Cached(found.st_size, array.stat().st_size, written)

    def _is_there(self, image: Path, image_time: int, array: Path) -> bool:
        if not array.exists():
            return False
        try:
            shape, dtype, _ = read_header(str(array))
            reason = "" if dtype == np.uint8 else f"holds {NORMALISED}"
        except BadSample as bad:
            reason = bad.reason
        if reason:
            raise UserError(
                f"{array}: {reason}. It is where the array of {image} would be, and is not replaced. Expected an array "
                "that this command made, or none. Remove it, or move npz/ away."
            )
        return min(shape[1:]) == self.size and array.stat().st_mtime_ns > image_time


def cache_loader(images: ImagesToCache, num_workers: int) -> DataLoader[Any]:
    """Make the arrays; yields lists of ``Cached`` in the order of the images."""
    return DataLoader(images, batch_size=BATCH, num_workers=num_workers, collate_fn=list)


def _write(array: Path, pixels: NDArray[np.uint8]) -> None:
    try:
        write_array(array, pixels)
    except OSError as error:
        # Out of a worker it would come without its number, by which the command line knows it.
        raise UserError(
            f"{array}: cannot be written ({error.strerror}). Expected room and permission for arrays below npz/. Those "
            "that are written stay, and the same command goes on."
        ) from None


def _require_own_names(folder: Path, images: Iterable[str]) -> None:
    owners: dict[str, str] = {}
    for image in images:
        array = cache_name(image)
        if array in owners:
            raise UserError(
                f"{folder}: {owners[array]} and {image} would both have {array}. Expected images with a place of their "
                "own. Rename one of them, and its caption."
            )
        owners[array] = image
