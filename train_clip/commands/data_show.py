"""Write a contact sheet: pairs as the model will see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from train_clip.commands.options import AugmentationOptions, TableOptions, require_least
from train_clip.data.batch_augmentation import BatchAugmentation, augment, draw_batch
from train_clip.data.contact_sheet import SheetEntry, contact_sheet
from train_clip.data.pairs import PairList, shown
from train_clip.data.pixels import bytes_to_show
from train_clip.data.samples import Augmentation, draw
from train_clip.data.source import scan_source
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import BadSample, UserError
from train_clip.files import write_text


@dataclass(frozen=True)
class ShowOptions(AugmentationOptions, TableOptions):
    """What is shown, and as which model sees it.

    Args:
        output: the page to write, HTML
        number: pairs, chosen at random
        crops: of each image, drawn as training draws them
        image_size: side of the model's square in pixels
        resize_ratio: as `train --resize_ratio`; likewise --color_jitter and the others of images
        context_length: tokens of a caption at most, start and end included
        seed: as `train --seed`; it also chooses the pairs
    """

    output: Path = Path("contact_sheet.html")
    number: int = 24
    crops: int = 4
    image_size: int = 224
    resize_ratio: float | None = None
    context_length: int = 77
    seed: int = 0


def data_show(folder: Path | None = None, /, *, options: ShowOptions) -> Path:
    """Write a contact sheet: crops as training draws them beside caption lines and tokens, what is cut marked.

    Args:
        folder: images and captions that share a stem; --pairs gives a table in its place
        options: what is shown.

    Returns:
        The page.

    Raises:
        UserError: nothing to show, or numbers that cannot be.
    """
    require_least(
        number=(options.number, 1),
        crops=(options.crops, 1),
        image_size=(options.image_size, 1),
        context_length=(options.context_length, 2),
        seed=(options.seed, 0),
    )
    if options.resize_ratio is not None and not 0 < options.resize_ratio <= 1:
        raise UserError(f"--resize_ratio {options.resize_ratio}: expected above 0, up to 1.")
    scan = scan_source(folder, options.pairs, options.columns, options.pair_by).require_pairs()
    number = min(options.number, len(scan.pairs))
    chosen = sorted(np.random.default_rng(options.seed).permutation(len(scan.pairs))[:number].tolist())
    entries = [entry(scan.pairs, place, options) for place in chosen]
    title = f"{number} of {len(scan.pairs):,} pairs of {shown(str(scan.source))}"
    write_text(options.output, contact_sheet(title, entries, Tokenizer(options.context_length)))
    print(f"{title}: {options.output}. Open it in a browser.")
    return options.output


def entry(pairs: PairList, place: int, options: ShowOptions) -> SheetEntry:
    """One pair, with crops drawn as training draws them."""
    how = Augmentation(options.image_size, options.resize_ratio, options.seed)
    changes = BatchAugmentation(options.color_jitter, options.grayscale, options.horizontal_flip, options.vertical_flip)
    name = shown(pairs.names[place])
    captions: list[str] = []
    try:
        captions = pairs[place].captions()
        rng = np.random.default_rng((options.seed, place))
        drawn = torch.stack([draw(pairs[place], how, rng)[0] for _ in range(options.crops)])
        draws = draw_batch(changes, (options.seed, place), slice(None), options.crops)
        crops = [bytes_to_show(crop) for crop in augment(drawn, changes, draws)]
    except BadSample as bad:
        return SheetEntry(name, [], captions, f"{shown(bad.path)}: {bad.reason}")
    return SheetEntry(name, crops, captions)
