"""Pictures of what a model does: images beside the captions that it finds most similar.

N  images      M  captions
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from train_clip.files import replacing

CAPTIONS_SHOWN = 3
COLUMNS = 3


def draw_best_captions(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    similarity: Tensor,
    right: Sequence[set[str]],
    target: Path,
) -> None:
    """Draw each image beside its most similar captions; its own are green with a tick, the others grey.

    Args:
        images: N pictures.
        captions: M different captions.
        similarity: (N, M) float, cosines.
        right: each image's own captions.
        target: the PNG to write.
    """
    # Imported here because it takes half a second; the object-oriented interface needs no display.
    from matplotlib.figure import Figure

    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 1.45 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 2] * COLUMNS)
    for panel in axes.flat:
        panel.axis("off")
    values, places = similarity.topk(min(CAPTIONS_SHOWN, len(captions)), dim=1)
    for number, image in enumerate(images):
        row, column = divmod(number, COLUMNS)
        axes[row, 2 * column].imshow(image)
        text_panel = axes[row, 2 * column + 1]
        for line, (value, place) in enumerate(zip(values[number].tolist(), places[number].tolist(), strict=True)):
            caption = captions[place]
            own = caption in right[number]
            # A dollar sign would begin a formula.
            wrapped = textwrap.shorten(caption, 64, placeholder=" …").replace("$", r"\$")
            text_panel.text(
                0.0,
                0.88 - 0.34 * line,
                f"{value:.2f} {'✓' if own else ' '} " + "\n          ".join(textwrap.wrap(wrapped, 34)),
                color="#12813a" if own else "#555555",
                fontsize=8,
                verticalalignment="top",
                transform=text_panel.transAxes,
            )
    with replacing(target) as beside:
        figure.savefig(beside, dpi=110, format="png")
