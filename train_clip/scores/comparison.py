"""Several models on the same images: the differences of their figures, with paired bootstrap intervals."""

from dataclasses import dataclass
from typing import Any

import torch

from train_clip.errors import UserError
from train_clip.evaluation import bootstrap
from train_clip.scores.subgroups import form_of


@dataclass(frozen=True)
class Differences:
    """A model's figures less those of the first, on the same resamples of the same images, by the figures' names."""

    names: tuple[str, str]  # the first model and the other
    figures: dict[str, list[float]]  # of the first and of the other
    differences: dict[str, float]
    intervals: bootstrap.Intervals

    def rows(self) -> list[list[str]]:
        """A heading, and a row for each figure."""
        rows = [[f"{self.names[1]} less {self.names[0]}", "first", "other", "difference", "95% interval", ""]]
        for name, difference in self.differences.items():
            form, interval = form_of(name), self.intervals.get(name)
            signed = form.replace(":", ":+")
            sure = interval is not None and (interval[0] > 0 or interval[1] < 0)
            cells = [form.format(one) for one in self.figures[name]]
            cells += [signed.format(difference), bootstrap.shown(interval, signed)]
            rows.append([name, *cells, "" if sure else "may be chance"])
        return rows


def compare(by_model: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The scores of each model, and the differences of each later one to the first; images must be the same."""
    first, *others = by_model
    own = by_model[first]
    for name in others:
        if by_model[name]["paths"] != own["paths"]:
            raise UserError(
                f"{first} and {name}: scored on {len(own['paths']):,} and {len(by_model[name]['paths']):,} images that "
                "are not the same. Expected one set of images, which does not change while it is scored."
            )
    replicates = {name: _replicates(scores) for name, scores in by_model.items()}
    differences = {}
    for name in others:
        (points, drawn), (other_points, other_drawn) = replicates[first], replicates[name]
        shared = [figure for figure in points if figure in other_points]
        differences[name] = Differences(
            (first, name),
            {figure: [points[figure], other_points[figure]] for figure in shared},
            {figure: other_points[figure] - points[figure] for figure in shared},
            bootstrap.intervals({figure: other_drawn[figure] - drawn[figure] for figure in shared}),
        )
    written = {name: {key: one for key, one in scores.items() if key != "paths"} for name, scores in by_model.items()}
    return {"models": written, "differences": differences}


def _replicates(scores: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    points, drawn = dict[str, float](), dict[str, torch.Tensor]()
    for result in (one for one in scores.values() if hasattr(one, "resampled")):
        once = torch.ones(1, result.num_images, dtype=torch.float64)
        points |= {name: one.item() for name, one in result.resampled(once).items()}
        drawn |= bootstrap.replicates(result, torch.arange(result.num_images))
    return points, drawn
