"""Write the arrays of a folder's images, which training reads in their place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train_clip.commands.options import require_least
from train_clip.commands.progress import with_progress
from train_clip.data.cores import available_cores
from train_clip.data.folder import scan_folder
from train_clip.data.npz import is_npz
from train_clip.data.npz_cache import BATCH, Cached, ImagesToCache, cache_loader
from train_clip.data.pairing import CACHE, cache_name
from train_clip.data.pairs import FlatStrings, PairList, plain_name, shown
from train_clip.data.scan import PairBy
from train_clip.errors import UserError
from train_clip.files import sweep

NAMED = 1000  # files of one reason on the screen


@dataclass(frozen=True)
class NpzOptions:
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
