"""Write the arrays of a folder's images, which training reads in their place: decoded and resized once, not each epoch.

An array holds the whole picture, its shorter side the model's size: the crop is still to be drawn.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train_clip.commands.progress import in_workers
from train_clip.data import arrays, crops
from train_clip.data.folder import CACHE, cache_name, scan_folder
from train_clip.data.images import is_npz, open_rgb, reading
from train_clip.data.pairs import FlatStrings, plain_name, shown
from train_clip.data_tools.check import by_reason
from train_clip.errors import BadSample, UserError
from train_clip.files import sweep
from train_clip.options import Options, PairBy, SourceOptions, at_least, option


@dataclass(frozen=True)
class NpzOptions(Options):
    """What the arrays are made for."""

    image_size: int = option(224, "side of the model's square in pixels", at_least(2))
    num_workers: int | None = option(None, "processes that decode; default: one a core", at_least(0))
    pair_by: PairBy = option("stem", "as `train --pair_by`")


def data_npz(folder: Path, /, *, options: NpzOptions) -> dict[str, int]:
    """Decode every image once, into npz/STEM.npz, which training reads in its place; what is there is kept.

    Args:
        folder: images and captions that share a stem
        options: what for

    Returns:
        How many were ``written``, ``there`` and ``bad``, and the ``image_bytes`` and ``cache_bytes`` on disk.
    """
    pairs = scan_folder(folder, SourceOptions(pair_by=options.pair_by)).require_pairs().pairs
    images = FlatStrings(name for name in pairs.names if not is_npz(name))
    if not len(images):
        raise UserError(f"{folder}: its {len(pairs):,} pairs have arrays (.npz) and no images. Expected images.")
    # Arrays that pair by number have names of their own, and a second one would make their number unclear.
    for name, pair in zip(pairs.names, pairs, strict=True):
        if pair.cache and plain_name(str(Path(pair.cache))) != plain_name(str(folder / cache_name(name))):
            raise UserError(
                f"{pair.cache}: is the array of {pair.image} by its number. Expected npz/ to hold no arrays but those "
                "that this command made. Move it away to make arrays of the images."
            )
    owners: dict[str, str] = {}
    for image in images:
        array = cache_name(image)
        if (owner := owners.setdefault(array, image)) != image:
            raise UserError(
                f"{folder}: {owner} and {image} would both have {array}. Expected images with a place of their own. "
                "Rename one of them, and its caption."
            )
    for place in {(folder / array).parent for array in owners}:
        sweep(place)
    cache = partial(cache_image, folder, options.image_size)
    found = Counter(written=0, there=0, bad=0, image_bytes=0, cache_bytes=0)
    bad: dict[str, list[str]] = defaultdict(list)
    for counts, fault in in_workers(cache, images, options.num_workers, "images"):
        found.update(counts)
        if fault is not None:
            bad[fault.reason].append(shown(fault.path))
    print("\n".join(_lines(folder, found, bad, options)))
    if found["bad"] == len(images):
        raise UserError(f"{folder}: none of the {len(images):,} images can be read.")
    return dict(found)


def cache_image(folder: Path, size: int, name: str) -> tuple[dict[str, int], BadSample | None]:
    """Write the array of an image below a folder, unless it is there, newer than its image and of the right size.

    Returns:
        What became of it and its bytes, to be counted; and why there is no array.
    """
    image, array = folder / name, folder / cache_name(name)
    try:
        with reading(str(image), "image"):
            found = image.stat()
        is_there = array.exists() and _side(image, array) == size and array.stat().st_mtime_ns > found.st_mtime_ns
        if not is_there:
            arrays.write_array(array, crops.to_tensor(crops.resize_shorter(open_rgb(str(image)), size)).numpy())
    except BadSample as bad:
        # An earlier array of the image would hide from training that it can no longer be read.
        array.unlink(missing_ok=True)
        return {"bad": 1}, bad
    except OSError as error:
        # Out of a worker it would come without its number, by which the command line knows it.
        raise UserError(
            f"{array}: cannot be written ({error.strerror}). Expected room and permission for arrays below npz/. Those "
            "that are written stay, and the same command goes on."
        ) from None
    kind = "there" if is_there else "written"
    return {kind: 1, "image_bytes": found.st_size, "cache_bytes": array.stat().st_size}, None


def _side(image: Path, array: Path) -> int:
    """The shorter side of what lies where the array would be, in pixels; what was not made here is not replaced."""
    try:
        found = arrays.read_array(str(array))
        if found.dtype == "uint8":
            return min(found.shape[1:])
        reason = f"holds {crops.NORMALISED}"
    except BadSample as bad:
        reason = bad.reason
    raise UserError(
        f"{array}: {reason}. It is where the array of {image} would be, and is not replaced. Expected an array that "
        "this command made, or none. Remove it, or move npz/ away."
    )


def _lines(folder: Path, found: Counter[str], bad: Mapping[str, list[str]], options: NpzOptions) -> Iterator[str]:
    yield (
        f"{folder / CACHE}: {found['written']:,} arrays written, {found['there']:,} were there; "
        f"{options.image_size} pixels on their shorter side"
    )
    if bad:
        yield f"Bad: {found['bad']:,} images have no array. Training skips them as it did."
    yield from by_reason(dict(sorted(bad.items())))
    if found["cache_bytes"]:
        cached, whole = found["cache_bytes"] / 2**20, found["image_bytes"] / 2**20
        yield f"On disk: {cached:,.1f} MiB beside {whole:,.1f} MiB of images ({cached / whole:.1f} times as much)"
        by_number = "" if options.pair_by == "stem" else f" --pair_by {options.pair_by}"
        yield f"Next: train-clip train --folder {folder}{by_number}, which reads them in the images' place."
