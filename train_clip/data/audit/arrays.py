"""What of the arrays that are read in place of images would stop a run."""

from __future__ import annotations

from train_clip.data.audit.store import AuditStore
from train_clip.data.npz import is_npz
from train_clip.data.pairs import PairList, shown
from train_clip.data.pixels import NORMALISED


def array_problems(pairs: PairList, store: AuditStore, image_size: int, val_pairs: int | None) -> list[str]:
    """Find arrays of another size than the model's, and lists that hold both kinds of pixels.

    Args:
        pairs: all of them.
        store: the facts of all of them.
        image_size: side of the model's square.
        val_pairs: how many of the pairs, the last of the list, are a list of their own.

    Returns:
        A message for each kind of problem.
    """
    if not pairs.num_cached and not any(map(is_npz, pairs.names)):
        return []
    problems = []
    sizes = store.rows(
        "SELECT place, MIN(width, height) FROM pairs WHERE width > 0 AND MIN(width, height) != ? ORDER BY place",
        image_size,
    )
    wrong = [(pairs[place].pixels, side) for place, side in sizes if is_npz(pairs[place].pixels)]
    if wrong:
        problems.append(
            f"{len(wrong):,} arrays are not of the model's {image_size} pixels, for instance {shown(wrong[0][0])} "
            f"({wrong[0][1]}); `train-clip data npz --image_size {image_size}` makes them anew."
        )
    division = len(pairs) - (val_pairs or 0)
    for start, end in ((0, division), (division, len(pairs))):
        legible, normalised = (
            store.one(
                f"SELECT COUNT(*) FROM pairs WHERE width > 0 AND place >= ? AND place < ? {condition}", start, end
            )[0]
            for condition in ("", f"AND id IN (SELECT pair FROM mended WHERE what = '{NORMALISED}')")
        )
        if 0 < normalised < legible:
            problems.append(
                f"{normalised:,} of {legible:,} images are arrays of already normalised pixels, the others pictures; "
                "expected one kind."
            )
    return problems
