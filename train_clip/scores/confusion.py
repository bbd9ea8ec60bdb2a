"""The confusion matrix as a table or a picture: images of each class, a row, by the class they are taken for."""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_clip.errors import UserError
from train_clip.evaluation.embed import Collection
from train_clip.evaluation.zero_shot import ZeroShot
from train_clip.files import replacing
from train_clip.losses.tiles import tiles
from train_clip.printing import no_formula

MOST_NAMED = 60  # classes whose names fit beside a picture


def write(collection: Collection, scores: ZeroShot | None, target: Path) -> None:
    """Write it as CSV, numbers of images, or as PNG, fractions of each class."""
    if scores is None:
        raise UserError(f"{target}: not written, since some images have several classes. Expected one class an image.")
    matrix, names = confusion(collection.images, scores, collection.classes)
    with replacing(target) as beside:
        if target.suffix.lower() == ".csv":
            with beside.open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["class", *map(no_formula, names)])
                rows.writerows([no_formula(name), *row.tolist()] for name, row in zip(names, matrix, strict=True))
        else:
            _draw(matrix, names, beside)


def confusion(images: Tensor, scores: ZeroShot, classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """How many of (N, D) images of each class, a row, are taken for each, (c, c), and the names of those classes.

    Top-1 ties count as the most similar other class. Classes that no image has, or is taken for, are left out.
    """
    taken, numbers = scores.labels.clone(), torch.arange(scores.num_classes, device=images.device)
    for at in tiles(len(images), scores.num_classes):
        own = scores.labels[at, None].to(images.device) == numbers
        others = (images[at] @ scores.classes.T).masked_fill(own, -torch.inf).argmax(dim=1)
        taken[at] = torch.where(scores.places[at] < 1, scores.labels[at], others.cpu())
    met, cells = torch.stack([scores.labels, taken]).unique(return_inverse=True)
    matrix = np.zeros((len(met), len(met)), np.int32)
    np.add.at(matrix, tuple(cells.numpy()), 1)
    return matrix, [classes[place] for place in met.tolist()]


def _draw(matrix: np.ndarray, names: list[str], target: Path) -> None:
    # Imported here because it takes half a second; the object-oriented interface needs no display.
    from matplotlib.figure import Figure

    side = 3 + 0.2 * min(len(names), MOST_NAMED)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="fraction of the class")
    axes.set(xlabel="taken for", ylabel="class")
    if len(names) <= MOST_NAMED:
        # A dollar sign begins no formula.
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    figure.savefig(target, dpi=110, format="png")
