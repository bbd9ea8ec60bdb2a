"""The figures of some of the images alone, by what a column of the table says of them; all are searched among all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_clip.errors import UsageError, UserError
from train_clip.printing import Intervals, interval
from train_clip.scores import bootstrap, columns

MOST = 1000  # subgroups


@dataclass(frozen=True)
class Subgroups:
    """By value of the column: the number of images, and the figures that they have, with intervals, by name."""

    column: str
    num_images: dict[str, int]
    values: dict[str, dict[str, float]]
    intervals: dict[str, Intervals]

    def rows(self) -> list[list[str]]:
        """A heading, and a row for each figure of each subgroup."""
        rows = [[self.column, "images", "", "", "95% interval"]]
        for value, found in self.values.items():
            for name, figure in found.items():
                form = form_of(name)
                cells = [form.format(figure), interval(self.intervals[value].get(name), form)]
                rows.append([value, f"{self.num_images[value]:,}", name, *cells])
        return rows


def read(options: Any) -> dict[str, list[str]]:
    """The values of ``options.by``, by images; refused, before anything is embedded, where they make no subgroups."""
    if options.pairs is None:
        raise UsageError(f"--by {options.by}: is a column of a table. Give the table by --pairs.")
    of_image = columns.values(options, options.by, "--by")
    if (number := len({value for several in of_image.values() for value in several})) > MOST:
        raise UserError(
            f"--by {options.by}: {number:,} different values among {len(of_image):,} images. Expected at most "
            f"{MOST:,}, each of several images."
        )
    return of_image


def score_by(of_image: dict[str, list[str]], scores: dict[str, Any], paths: list[str], column: str) -> Subgroups:
    """Score the images of each value of a column; an image with several is in each of their subgroups."""
    members: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        for value in of_image.get(str(Path(path)), ["(none)"]):
            members.setdefault(value, []).append(place)
    found, intervals = dict[str, dict[str, float]](), dict[str, Intervals]()
    for value in sorted(members):
        places = torch.tensor(members[value])
        once = torch.zeros(1, len(paths), dtype=torch.float64).index_fill_(1, places, 1)
        found[value], intervals[value] = {}, {}
        for result in bootstrap.scored(scores.values()):
            figures = bootstrap.resampled(result, once)
            found[value] |= {name: one.item() for name, one in figures.items() if not one.isnan()}
            drawn, number = bootstrap.replicates(result, places), bootstrap.num_scored(result, places)
            intervals[value] |= bootstrap.intervals(drawn, number)
    return Subgroups(column, {value: len(members[value]) for value in found}, found, intervals)


def form_of(name: str) -> str:
    """How a figure is written: ranks as numbers, all others as percentages."""
    return "{:,.1f}" if "rank" in name else "{:.1%}"
