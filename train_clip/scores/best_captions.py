"""A picture of some of the images next to the captions that the model finds most similar."""

import random
import textwrap
from pathlib import Path
from typing import Any

from train_clip.data import crops
from train_clip.evaluation.embed import Collection
from train_clip.files import replacing

IMAGES_DRAWN, COLUMNS = 18, 3
CAPTIONS_DRAWN = 3  # of each
MOST_CHARACTERS = 200  # of a caption, more than is drawn


def draw(collection: Collection, target: Path) -> None:
    """Draw a fixed random choice of images next to their best captions; correct ones are green with a tick."""
    # Imported here because it takes half a second; the object-oriented interface needs no display.
    from matplotlib.figure import Figure

    paths, captions = collection.paths, collection.captions
    ids = collection.caption_ids.tolist()
    own = set(zip(collection.owners, ids, strict=True))
    chosen = sorted(random.Random(0).sample(range(len(paths)), min(IMAGES_DRAWN, len(paths))))
    different = list({caption: place for place, caption in enumerate(ids)}.values())
    texts = collection.texts[different]
    best = (collection.images[chosen] @ texts.T).cpu().topk(min(CAPTIONS_DRAWN, len(different)), dim=1)
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 1.45 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 2] * COLUMNS)
    for panel in axes.flat:
        panel.axis("off")
    panels = iter(axes.flat)
    for image, values, indices in zip(chosen, best.values.tolist(), best.indices.tolist(), strict=True):
        next(panels).imshow(crops.read_picture(paths[image]).picture)
        beside = next(panels)
        for line, (value, index) in enumerate(zip(values, indices, strict=True)):
            caption = captions[different[index]]
            mark, colour = ("✓", "#12813a") if (image, ids[different[index]]) in own else (" ", "#555555")
            line_of = f"{value:.2f} {mark} {caption[:MOST_CHARACTERS]}"
            text = textwrap.fill(line_of, 41, subsequent_indent=" " * 10, max_lines=2, placeholder=" …")
            # A dollar sign begins no formula.
            how = {"color": colour, "fontsize": 8, "verticalalignment": "top", "parse_math": False}
            beside.text(0, 0.88 - 0.34 * line, text, **how)
    with replacing(target) as file:
        figure.savefig(file, dpi=110, format="png")
