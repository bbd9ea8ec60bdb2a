"""The figures of some of the images alone, by what a column of the table says of them; all are searched among all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_clip.errors import UserError
from train_clip.printing import Intervals, interval
from train_clip.scores import bootstrap, columns

MOST = 1000  # subgroups


@dataclass(frozen=True)
class Subgroups:
    """By value of the column, and of each figure's name: the figure, its interval, and the number of images."""

    column: str
    num_images: dict[str, int]
    values: dict[str, dict[str, float]]
    intervals: dict[str, Intervals]

    def rows(self) -> list[list[str]]:
        """A heading, and a row for each subgroup."""
        names = list(next(iter(self.values.values())))
        rows = [[self.column, "images", *(cell for name in names for cell in (name, "95% interval"))]]
        for value, found in self.values.items():
            row = [value, f"{self.num_images[value]:,}"]
            for name in names:
                form = form_of(name)
                missing = found[name] != found[name]
                row += ["" if missing else form.format(found[name])]
                row += [interval(self.intervals[value].get(name), form)]
            rows.append(row)
        return rows


def score_by(scores: dict[str, Any], paths: list[str], options: Any) -> Subgroups:
    """Score the images of each value of ``options.by``; an image with several is in each of their subgroups."""
    of_image = columns.values(options, options.by)
    members: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        for value in of_image.get(str(Path(path)), ["(none)"]):
            members.setdefault(value, []).append(place)
    if len(members) > MOST:
        raise UserError(
            f"--by {options.by}: {len(members):,} different values among {len(paths):,} images. Expected at most "
            f"{MOST:,}, each of several images."
        )
    found, intervals = dict[str, dict[str, float]](), dict[str, Intervals]()
    for value in sorted(members):
        places = torch.tensor(members[value])
        once = torch.zeros(1, len(paths), dtype=torch.float64).index_fill_(1, places, 1)
        found[value], intervals[value] = {}, {}
        for result in bootstrap.scored(scores.values()):
            found[value] |= {name: one.item() for name, one in bootstrap.resampled(result, once).items()}
            intervals[value] |= bootstrap.intervals(bootstrap.replicates(result, places))
    return Subgroups(options.by, {value: len(members[value]) for value in found}, found, intervals)


def form_of(name: str) -> str:
    """How a figure is written: ranks as numbers, all others as percentages."""
    return "{:,.1f}" if "rank" in name else "{:.1%}"
