"""A picture of what a model does: images beside the captions that it finds most similar."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path
from typing import Any

from train_clip.data.crops import read_picture
from train_clip.evaluation.embed import Collection
from train_clip.files import replacing

IMAGES_SHOWN = 18
CAPTIONS_SHOWN = 3
COLUMNS = 3


def draw_best_captions(collection: Collection, target: Path) -> None:
    """Draw a fixed random choice of images beside their best captions; their own are green with a tick."""
    # Imported here because it takes half a second; the object-oriented interface needs no display.
    from matplotlib.figure import Figure

    paths, captions, owners = collection.paths, collection.captions, collection.owners
    chosen = sorted(random.Random(0).sample(range(len(paths)), min(IMAGES_SHOWN, len(paths))))
    different = list(dict.fromkeys(captions))
    texts = collection.texts[[captions.index(caption) for caption in different]]
    similarity = (collection.images[chosen] @ texts.T).cpu()
    values, places = similarity.topk(min(CAPTIONS_SHOWN, len(different)), dim=1)
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 1.45 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 2] * COLUMNS)
    for panel in axes.flat:
        panel.axis("off")
    panels = iter(axes.flat)
    for number, image in enumerate(chosen):
        next(panels).imshow(read_picture(paths[image]).picture)
        text_panel = next(panels)
        own = {caption for caption, owner in zip(captions, owners, strict=True) if owner == image}
        for line, (value, place) in enumerate(zip(values[number].tolist(), places[number].tolist(), strict=True)):
            caption = different[place]
            # A dollar sign would begin a formula.
            wrapped = textwrap.wrap(textwrap.shorten(caption, 64, placeholder=" …").replace("$", r"\$"), 34)
            text_panel.text(
                0.0,
                0.88 - 0.34 * line,
                f"{value:.2f} {'✓' if caption in own else ' '} " + "\n          ".join(wrapped),
                color="#12813a" if caption in own else "#555555",
                fontsize=8,
                verticalalignment="top",
                transform=text_panel.transAxes,
            )
    with replacing(target) as beside:
        figure.savefig(beside, dpi=110, format="png")
