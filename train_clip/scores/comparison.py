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
    drawn, differences = {name: _replicates(of_model) for name, of_model in scores.items()}, {}
    for name in models[1:]:
        shared = {figure: other for figure, other in drawn[name].items() if figure in drawn[first]}
        pairs = {figure: (drawn[first][figure], other) for figure, other in shared.items()}
        differences[name] = Differences(
            (first, name),
            {figure: [own[0].item(), other[0].item()] for figure, (own, other) in pairs.items()},
            {figure: (other[0] - own[0]).item() for figure, (own, other) in pairs.items()},
            bootstrap.intervals({figure: (other - own)[1:] for figure, (own, other) in pairs.items()}),
        )
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


def _replicates(scores: evaluate.Scores) -> dict[str, torch.Tensor]:
    """Each figure, and then its resamples."""
    drawn = dict[str, torch.Tensor]()
    for result in bootstrap.scored(scores.values()):
        once = bootstrap.resampled(result, torch.ones(1, result.num_images, dtype=torch.float64))
        found = bootstrap.replicates(result, torch.arange(result.num_images))
        drawn |= {name: torch.cat([once[name], found[name]]) for name in once}
    return drawn
