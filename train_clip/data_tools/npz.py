"""Write the arrays of a folder's images, which training reads in their place.

Images → arrays beside them that training reads in their place: decoded and resized once, not once an epoch.

An array holds the whole picture, its shorter side the model's size. What every crop of an image does first is done, and
the crop itself is still to be drawn.

S  side of the model's square in pixels
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from train_clip.commands.options import require_least
from train_clip.commands.progress import with_progress
from train_clip.data.arrays import is_npz, read_header, write_array
from train_clip.data.crops import NORMALISED, resize_shorter, to_tensor
from train_clip.data.folder import CACHE, cache_name, scan_folder
from train_clip.data.images import open_rgb, reading
from train_clip.data.pairs import FlatStrings, PairList, plain_name, shown
from train_clip.data.samples import available_cores
from train_clip.data.scan import PairBy
from train_clip.errors import BadSample, UserError
from train_clip.files import sweep
from train_clip.options import Options
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


NAMED = 1000  # files of one reason on the screen


@dataclass(frozen=True)
class NpzOptions(Options):
    """What the arrays are made for.

    Args:
        image_size: side of the model's square in pixels
        num_workers: processes that decode, if not one a core
        pair_by: as `train --pair_by`
    """

    image_size: int = 224
    num_workers: int | None = None
    pair_by: PairBy = "stem"


def data_npz(folder: Path, /, *, options: NpzOptions) -> dict[str, int]:
    """Decode every image once, into npz/STEM.npz, which training reads in its place; what is there is kept.

    Args:
        folder: images and captions that share a stem
        options: what for.

    Returns:
        How many arrays were ``written``, were ``there``, and how many images were ``bad``; ``image_bytes`` and
        ``cache_bytes`` on disk.

    Raises:
        UserError: no pairs of an image and a caption, none that can be read, or arrays that are not ours to replace.
    """
    require_least(image_size=(options.image_size, 2), num_workers=(options.num_workers or 0, 0))
    pairs = scan_folder(folder, options.pair_by).require_pairs().pairs
    images = FlatStrings(name for name in pairs.names if not is_npz(name))
    if not len(images):
        raise UserError(f"{folder}: its {len(pairs):,} pairs have arrays (.npz) and no images. Expected images.")
    _require_no_other(folder, pairs)
    to_do = ImagesToCache(folder, images, options.image_size)
    for place in {(folder / cache_name(image)).parent for image in images}:
        sweep(place)
    workers = available_cores() if options.num_workers is None else options.num_workers
    found = Counter(dict.fromkeys(("written", "there", "bad", "image_bytes", "cache_bytes"), 0))
    bad: dict[str, list[str]] = defaultdict(list)
    for some in with_progress(cache_loader(to_do, workers), f"batches of {BATCH} images"):
        for one in some:
            _count(one, found, bad)
    print("\n".join(_lines(folder, found, bad, options)))
    if found["bad"] == len(images):
        raise UserError(f"{folder}: none of the {len(images):,} images can be read.")
    return dict(found)


def _require_no_other(folder: Path, pairs: PairList) -> None:
    """Arrays that pair by number have names of their own, and a second one would make their number unclear."""
    for name, pair in zip(pairs.names, pairs, strict=True):
        if pair.cache and plain_name(str(Path(pair.cache))) != plain_name(str(folder / cache_name(name))):
            raise UserError(
                f"{pair.cache}: is the array of {pair.image} by its number. Expected npz/ to hold no arrays but those "
                "that this command made. Move it away to make arrays of the images."
            )


def _count(one: Cached, found: Counter[str], bad: dict[str, list[str]]) -> None:
    if one.bad is not None:
        found["bad"] += 1
        bad[one.bad.reason].append(shown(one.bad.path))
        return
    found["written" if one.written else "there"] += 1
    found["image_bytes"] += one.image_bytes
    found["cache_bytes"] += one.cache_bytes


def _lines(folder: Path, found: Counter[str], bad: dict[str, list[str]], options: NpzOptions) -> Iterator[str]:
    yield (
        f"{folder / CACHE}: {found['written']:,} arrays written, {found['there']:,} were there; "
        f"{options.image_size} pixels on their shorter side"
    )
    if bad:
        yield f"Bad: {found['bad']:,} images have no array. Training skips them as it did."
    for reason, paths in sorted(bad.items()):
        yield f"  {len(paths):,} × {reason}"
        yield from (f"    {path}" for path in paths[:NAMED])
        if len(paths) > NAMED:
            yield f"    … and {len(paths) - NAMED:,} more"
    if found["cache_bytes"]:
        arrays, images = (found[what] / 2**20 for what in ("cache_bytes", "image_bytes"))
        yield f"On disk: {arrays:,.1f} MiB beside {images:,.1f} MiB of images ({arrays / images:.1f} times as much)"
        by_number = "" if options.pair_by == "stem" else f" --pair_by {options.pair_by}"
        yield f"Next: train-clip train --folder {folder}{by_number}, which reads them in the images' place."
