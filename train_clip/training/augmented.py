"""The images of a training batch as a run wants them, and what is said beforehand of captions that would not fit.

B  pairs on this process      N  pairs of the global batch      S  side of the image in pixels
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from train_clip.data.batch_augmentation import BatchAugmentation, augment, draw_batch
from train_clip.data.flip_words import WORDS, count_named, some_captions
from train_clip.data.pairs import PairList
from train_clip.gather import world

MOST_SHOWN = 80  # letters of a caption


def augmented(images: Tensor, how: BatchAugmentation, seed: int, batch: int) -> Tensor:
    """Augment this process's images, by draws that depend on the seed, the batch and their place in it alone.

    Args:
        images: (B, 3, S, S) uint8, or float that is already normalised; stays as it is.
        how: what is done.
        seed: of the run.
        batch: global batches before this one.

    Raises:
        UserError: colours of floats are to change.
    """
    if not (how.changes_colours or how.flips):
        return images
    rank, processes = world()
    rows = slice(rank * len(images), (rank + 1) * len(images))
    return augment(images, how, draw_batch(how, (seed, batch), rows, processes * len(images)).on(images.device))


@rank_zero_only
def warn_of_flips(how: BatchAugmentation, data: Any) -> None:
    """Say where captions name what a flip turns round.

    Args:
        how: what is done to images.
        data: the Trainer's data module; of this package's a sample of the training captions is looked at.
    """
    pairs = getattr(data, "training_pairs", None)
    asked = [flip for flip in WORDS if getattr(how, flip)]
    if not asked or not isinstance(pairs, PairList):
        return
    captions = some_captions(pairs)
    for flip in asked:
        named = count_named(captions, flip)
        if named.number:
            shown = named.example if len(named.example) <= MOST_SHOWN else named.example[:MOST_SHOWN] + "…"
            rank_zero_warn(
                f"{flip} is {getattr(how, flip)}, and {named.number:,} of {named.of:,} captions looked at "
                f"({named.number / named.of:.1%}) name a side, a sense of turning or text, such as {named.word!r} in "
                f"“{shown}”. A mirrored image no longer fits them. Leave the flip out, unless these words mean "
                "something else here."
            )
