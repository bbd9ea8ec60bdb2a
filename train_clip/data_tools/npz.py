"""Write arrays that training reads instead of a folder's images: decoded and resized once, not in each epoch.

An array holds the whole picture, its shorter side the model's size: the crop is still to be drawn.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train_clip.commands.progress import in_workers
from train_clip.data import arrays, crops
from train_clip.data.folder import CACHE, cache_name, scan_folder
from train_clip.data.images import is_npz, open_rgb, reading
from train_clip.data.pairs import plain_name
from train_clip.data_tools.check import by_reason
from train_clip.errors import BadSample, UserError
from train_clip.estimates import require_room, size
from train_clip.files import sweep
from train_clip.options import Options, PairBy, SourceOptions, at_least, option
from train_clip.printing import printable


@dataclass(frozen=True)
class NpzOptions(Options):
    """How to write the arrays."""

    image_size: int = option(224, "side of the model's square input in pixels", at_least(2))
    num_workers: int | None = option(None, "worker processes; default: one per core", at_least(0))
    pair_by: PairBy = option("stem", "like `train --pair_by`")


def data_npz(folder: Path, /, *, options: NpzOptions) -> dict[str, int]:
    """Decode every image once, into npz/STEM.npz, which training reads instead; existing arrays are kept.

    Args:
        folder: images and captions that share a stem
        options: the size and how to write

    Returns:
        How many were ``written``, ``there`` and ``bad``, and the ``image_bytes`` and ``cache_bytes`` on disk.
    """
    pairs = scan_folder(folder, SourceOptions(pair_by=options.pair_by)).require_pairs().pairs
    images: dict[str, str] = {}  # by the name of its array
    for name, pair in zip(pairs.names, pairs, strict=True):
        if is_npz(name):
            continue
        array = cache_name(name)
        # Arrays that pair by number have names of their own, and a second one would make their number unclear.
        if pair.cache and plain_name(str(Path(pair.cache))) != plain_name(str(folder / array)):
            raise UserError(
                f"{pair.cache}: is already used as the array of {pair.image}, by its number. Expected only arrays "
                "that this command wrote in npz/. Move it away to write arrays of the images."
            )
        if (owner := images.setdefault(array, name)) != name:
            raise UserError(
                f"{folder}: {owner} and {name} would both have {array}. Expected a different array for each image. "
                "Rename one of them, and its caption."
            )
    for place in {(folder / array).parent for array in images}:
        sweep(place)
    number = sum(not (folder / array).exists() for array in images)
    least = number * 3 * options.image_size**2  # of squares; others take more
    free = require_room(folder / CACHE, least, f"{number:,} arrays take at least")
    print(f"{number:,} arrays to write: at least {size(least)}; {size(free)} are free.")
    cache = partial(cache_image, folder, options.image_size)
    counts = Counter(written=0, there=0, bad=0, image_bytes=0, cache_bytes=0)
    bad: dict[str, list[str]] = defaultdict(list)
    for found in in_workers(cache, list(images.values()), options.num_workers, "images"):
        if isinstance(found, BadSample):
            counts["bad"] += 1
            bad[found.reason].append(printable(found.path))
        else:
            counts.update(found)
    print(
        f"{folder / CACHE}: {counts['written']:,} arrays written, {counts['there']:,} already existed; "
        f"{options.image_size} pixels on the shorter side"
    )
    if bad:
        print(f"Bad: {counts['bad']:,} images have no array. Training skips them as before.", *by_reason(bad), sep="\n")
    if counts["bad"] == len(images):
        raise UserError(
            f"{folder}: none of its {len(images):,} images can be read; {len(pairs) - len(images):,} pairs have arrays "
            "(.npz) and no images. Expected images."
        )
    cached, whole = counts["cache_bytes"], counts["image_bytes"]
    print(f"On disk: {size(cached)}, compared with {size(whole)} of images ({cached / whole:.1f} times as much)")
    by_number = "" if options.pair_by == "stem" else f" --pair_by {options.pair_by}"
    print(f"Next: train-clip train --folder {folder}{by_number}, which reads them instead of the images.")
    return dict(counts)


def cache_image(folder: Path, size: int, name: str) -> dict[str, int] | BadSample:
    """Write the array of an image below a folder, unless it is there, newer than its image and of the right size.

    Returns:
        What became of it and its bytes, to be counted; or why there is no array.
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
        return bad
    except OSError as error:
        # Out of a worker it would come without its number, by which the command line knows it.
        raise UserError(
            f"{array}: cannot be written ({error.strerror}). Expected free space, and permission to write below npz/. "
            "Arrays already written are kept; run the same command to continue."
        ) from None
    kind = "there" if is_there else "written"
    return {kind: 1, "image_bytes": found.st_size, "cache_bytes": array.stat().st_size}


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
        f"{array}: {reason}. It has the name of the array of {image}, and is not overwritten. Expected an array that "
        "this command wrote, or none. Remove it, or move npz/ away."
    )
