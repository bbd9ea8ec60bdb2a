"""Several models on the same images: the differences of their figures, with paired bootstrap intervals."""

from dataclasses import dataclass

import torch

from train_clip.commands import evaluate
from train_clip.errors import UsageError, UserError
from train_clip.options import WeightOptions
from train_clip.printing import Intervals, interval
from train_clip.scores import bootstrap
from train_clip.scores.subgroups import form_of


@dataclass(frozen=True)
class Differences:
    """A model's figures less those of the first, on the same resamples of the same images, by the figures' names."""

    names: tuple[str, str]  # the first model and the other
    figures: dict[str, list[float]]  # of the first and of the other
    differences: dict[str, float]
    intervals: Intervals

    def rows(self) -> list[list[str]]:
        """A heading, and a row for each figure."""
        rows = [[f"{self.names[1]} less {self.names[0]}", "first", "other", "difference", "95% interval", ""]]
        for name, difference in self.differences.items():
            form, bounds = form_of(name), self.intervals.get(name)
            signed = form.replace(":", ":+")
            sure = bounds is not None and (bounds[0] > 0 or bounds[1] < 0)
            cells = [form.format(one) for one in self.figures[name]]
            cells += [signed.format(difference), interval(bounds, signed)]
            rows.append([name, *cells, "" if sure else "may be chance"])
        return rows


def compare(models: list[str], options: evaluate.EvaluateOptions, weights: WeightOptions) -> evaluate.Scores:
    """Score each model, and compare each later one with the first, on the same images."""
    for name in ("by", "confusion", "picture", "calibrate"):
        if value := getattr(options, name):
            raise UsageError(f"--{name} {value}: is for one model; found {len(models)}. Evaluate it alone.")
    if len({*models}) < len(models):
        raise UsageError(f"{', '.join(models)}: a model is given twice. Expected different ones to compare.")
    scores, paths = dict[str, evaluate.Scores](), dict[str, list[str]]()
    for name in models:
        scores[name], collection = evaluate.score(evaluate.load(name, options, weights)[0], options)
        paths[name] = collection.paths
        if paths[name] != paths[first := models[0]]:
            raise UserError(
                f"{first} and {name}: scored on {len(paths[first]):,} and {len(paths[name]):,} images that are not the "
                "same. Expected one set of images, which does not change while it is scored."
            )
    drawn = {name: _replicates(of_model) for name, of_model in scores.items()}
    differences = {name: _differences((first, name), drawn[first], drawn[name]) for name in models[1:]}
    found = {"models": scores, "differences": differences}
    if options.json is not None:
        evaluate.write_json(options.json, found)
    for name in models:
        print(f"\n{name}")
        evaluate.report(scores[name])
    for rows in differences.values():
        print()
        evaluate.print_table(rows.rows())
    return found


Replicates = dict[str, tuple[torch.Tensor, int]]
"""Of each figure: itself and its resamples, (1 + R,), and the number of images that it is of."""


def _replicates(scores: evaluate.Scores) -> Replicates:
    drawn = Replicates()
    for result in bootstrap.scored(scores.values()):
        members = torch.arange(result.num_images)
        once = bootstrap.resampled(result, torch.ones(1, result.num_images, dtype=torch.float64))
        found, number = bootstrap.replicates(result, members), bootstrap.num_scored(result, members)
        drawn |= {name: (torch.cat([once[name], found[name]]), number) for name in once}
    return drawn


def _differences(names: tuple[str, str], first: Replicates, other: Replicates) -> Differences:
    figures, differences, intervals = dict[str, list[float]](), dict[str, float](), Intervals()
    for name in [name for name in other if name in first]:
        (mine, number), (its, _) = first[name], other[name]
        figures[name], differences[name] = [mine[0].item(), its[0].item()], (its[0] - mine[0]).item()
        intervals |= bootstrap.intervals({name: (its - mine)[1:]}, number, least=-1.0)
    return Differences(names, figures, differences, intervals)
