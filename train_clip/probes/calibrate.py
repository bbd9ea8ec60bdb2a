"""What a similarity means: the threshold above which a wanted share of pairs matches, and a probability.

A pair is an image with a caption, or with a class; it matches where the image has it. Half of the images are fitted on,
the others show whether the promise is kept. Intervals resample images: pairs of one image hang together.

N  images      M  candidates: different captions, or classes      P  pairs that match      K  thresholds
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.evaluate import EvaluateOptions, write_json
from train_clip.errors import UserError
from train_clip.evaluation import embed, zero_shot
from train_clip.files import require_place, require_writable
from train_clip.losses.tiles import tiles
from train_clip.optional import optional
from train_clip.printing import interval
from train_clip.probes.calibration import CAPTIONS, CLASSES, VERSION, Calibration, place_of
from train_clip.scores.bootstrap import intervals, ratios

THRESHOLDS = 256  # K that are tried: quantiles of the similarities of pairs that match
ROUNDING = 1e-6  # by which sums of the same products may differ
BINS = 2**14  # of similarities in [-1, 1]
CENTERS = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
CURVE = 15  # bins of probabilities, of equal width (Guo et al. 2017, arXiv 1706.04599, section 5)
TAIL = 0.025  # of resamples outside an interval, at each end


@dataclass(frozen=True)
class Calibrated:
    """What was fitted, and what it keeps on images that the fit never saw."""

    candidates: str  # how many there were, of which kind
    images: list[int]  # fitted on, checked on
    calibration: Calibration
    check: dict[str, Any]
    own: str  # what the model's own probabilities are: softmax, or sigmoid where its logits have a bias
    written: str = field(default="", repr=False)  # where it is written, in a line

    def rows(self) -> str:
        """Lines to be printed."""
        precision, threshold, told = self.calibration.precision, self.calibration.threshold, self.check
        lines = [f"calibrated on {self.images[0]:,} images and {self.candidates}, checked on {self.images[1]:,} others"]
        if threshold is None:
            lines.append(f"  no threshold surely keeps a precision of {precision:.1%}: use more pairs, or a lower one")
        else:
            lines.append(f"  threshold for a precision of {precision:.1%}: similarity {threshold:.4f}")
        lines += [
            f"  {name} on the others: {told[name]['value']:.1%} {interval(told[name]['interval'])}"
            for name in ("precision", "recall")
            if name in told
        ]
        before, after = told["ece_before"], told["ece_after"]
        lines.append(f"  calibration error: {before:.2%} by the model's {self.own}, {after:.2%} calibrated")
        return "\n".join([*lines, self.written])


def require(source: str, options: EvaluateOptions) -> None:
    """Refuse, before anything is embedded, what could not be fitted, or written beside the weights."""
    optional("sklearn.linear_model", "--calibrate")
    path = place_of(source, CLASSES if options.classes else CAPTIONS)
    require_place(path)
    require_writable(path.parent, "copy the weights to another folder")


def calibrate(model: Pretrained, source: str, collection: embed.Collection, options: EvaluateOptions) -> Calibrated:
    """Fit the similarity above which a wanted share of pairs matches, and a probability; write both beside the model.

    Args:
        model: what was evaluated.
        source: where it was read.
        collection: its embeddings of pairs that it was not trained on.
        options: what is wanted.
    """
    kind = CLASSES if collection.classes else CAPTIONS
    fitted, others = halves(sides(collection), every=kind == CLASSES)
    if not all(half.matches.numel() for half in (fitted, others)):
        raise UserError(
            f"--calibrate: {len(collection.paths):,} images with a caption or class. Expected some for each half: add "
            "more."
        )
    calibration = fit(fitted, options.min_precision)
    bias = None if model.model.logit_bias is None else model.model.logit_bias.item()
    found = Calibrated(
        candidates=f"{len(fitted.candidates):,} {kind}",
        images=[len(fitted.images), len(others.images)],
        calibration=calibration,
        check=check(others, calibration, model.model.logit_scale.exp().item(), bias),
        own="softmax" if bias is None else "sigmoid",
    )
    about = {"version": VERSION, "kind": kind, "model": model.model.name, "fingerprint": fingerprint(model.model)}
    path = place_of(source, kind)
    write_json(path, about | {name: value for name, value in vars(found).items() if name != "written"})
    finder = "classify" if kind == CLASSES else "search"
    return replace(found, written=f"Calibration: {path}, where `{finder}` finds it.")


class Sides(NamedTuple):
    """Images, candidates, and which of them match."""

    images: Tensor  # (N, D) unit norm
    candidates: Tensor  # (M, D) unit norm
    matches: Tensor  # (2, P) int64: places of an image and of a candidate, each pair once


def sides(collection: embed.Collection) -> Sides:
    """The images and the classes, or the different captions."""
    images = collection.images.cpu()
    if collection.classes:
        texts = zero_shot.class_embeddings(collection.classes, collection.templates, collection.embed_texts).cpu()
        of_images = collection.label_sets or [[label] for label in collection.labels]
        places = [[image, label] for image, labels in enumerate(of_images) for label in labels]
        return Sides(images, texts, torch.tensor(places, dtype=torch.long).view(-1, 2).T)
    if not collection.captions:
        raise UserError("--calibrate: no captions among the data. Expected images with captions, or --classes.")
    _, first, ids = np.unique(collection.caption_ids.cpu().numpy(), return_index=True, return_inverse=True)
    pairs = torch.stack([torch.tensor(collection.owners), torch.from_numpy(ids)])
    return Sides(images, collection.texts.cpu()[torch.from_numpy(first)], torch.unique(pairs, dim=1))


def halves(both: Sides, every: bool, seed: int = 0) -> list[Sides]:
    """Two halves of the images, by chance, with every candidate, or those that match any of the half."""
    parts = list[Sides]()
    for half in torch.from_numpy(np.random.default_rng(seed).permutation(len(both.images))).tensor_split(2):
        places = torch.full((len(both.images),), -1)
        places[half] = torch.arange(len(half))
        images, candidates = both.matches[:, places[both.matches[0]] >= 0]
        chosen = torch.arange(len(both.candidates)) if every else candidates.unique()
        matches = torch.stack([places[images], torch.searchsorted(chosen, candidates)])
        parts.append(Sides(both.images[half], both.candidates[chosen], matches))
    return parts


def blocks(both: Sides) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Similarities of some images with all candidates, (n, M) float64, and which match, (n, M) bool."""
    for at in tiles(len(both.images), len(both.candidates)):
        similarities = both.images[at] @ both.candidates.T
        own = both.matches[:, (both.matches[0] >= at.start) & (both.matches[0] < at.stop)]
        right = torch.zeros(similarities.shape, dtype=torch.bool)
        right[own[0] - at.start, own[1]] = True
        yield at, similarities.double(), right


def fit(both: Sides, precision: float) -> Calibration:
    """The lowest threshold at which the lower end of the precision's band keeps what is wanted; Platt's scaling.

    A threshold with fewer images above it than could show that, if all of their pairs matched, is not considered.
    """
    own = (both.images[both.matches[0]] * both.candidates[both.matches[1]]).sum(dim=1).numpy()
    thresholds = np.unique(np.quantile(own, np.linspace(0, 1, THRESHOLDS), method="lower")) - ROUNDING
    hits, tries = above(both, thresholds)
    drawn, found = ratios(hits, tries).nan_to_num().numpy(), (hits.sum(dim=0) / tries.sum(dim=0)).nan_to_num().numpy()
    enough = (tries > 0).sum(dim=0).numpy() >= math.log(TAIL) / math.log(precision)
    # A band for all thresholds at once: the one that is chosen is the luckiest of many.
    spread = np.maximum(drawn.std(axis=0), ROUNDING)
    farthest = ((drawn - found) / spread)[:, enough].max(axis=1, initial=0)
    kept = enough & (found - np.quantile(farthest, 1 - TAIL) * spread >= precision)
    threshold = float(thresholds[kept][0]) if kept.any() else None
    return Calibration(threshold, precision, *platt(histogram(both)))


def above(both: Sides, thresholds: Any) -> Tensor:
    """Of each image, the pairs that match, and all pairs, at or above each rising threshold: (2, N, K) float64."""
    at_least, number = torch.as_tensor(thresholds, dtype=torch.float64), len(thresholds) + 1
    counts = torch.zeros(2, len(both.images), number, dtype=torch.float64)
    for at, similarities, right in blocks(both):
        places = torch.bucketize(similarities, at_least, right=True) + torch.arange(len(right))[:, None] * number
        for count, some in zip(counts, (places[right], places.flatten()), strict=True):
            count[at] = torch.bincount(some, minlength=len(right) * number).view(-1, number).double()
    return counts.flip(2).cumsum(dim=2).flip(2)[:, :, 1:]


def histogram(both: Sides) -> np.ndarray:
    """How many pairs do not match, and do, by similarity: (2, BINS) float64."""
    counts = torch.zeros(2 * BINS, dtype=torch.long)
    for _, similarities, right in blocks(both):
        bins = ((similarities + 1) * (BINS / 2)).long().clamp(0, BINS - 1) + BINS * right
        counts += torch.bincount(bins.flatten(), minlength=2 * BINS)
    return counts.view(2, BINS).double().numpy()


def platt(counts: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the logistic function of a similarity, its targets a little off 0 and 1 (Platt 1999)."""
    some = counts.sum(axis=0) > 0
    wrong, right = counts[:, some]
    smooth = (1 / (wrong.sum() + 2), (right.sum() + 1) / (right.sum() + 2))
    ones = wrong * smooth[0] + right * smooth[1]
    x = CENTERS[some]
    middle, spread = x.mean(), x.std() or 1.0
    linear_model = optional("sklearn.linear_model", "--calibrate")
    model = linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8)
    targets = np.repeat([0, 1], len(x))
    model.fit(np.tile((x - middle) / spread, 2)[:, None], targets, np.concatenate([wrong + right - ones, ones]))
    slope = model.coef_.item() / spread
    return slope, model.intercept_.item() - slope * middle


def check(both: Sides, calibration: Calibration, scale: float, bias: float | None = None) -> dict[str, Any]:
    """What the calibration keeps on other images: precision and recall with intervals; curves before and after."""
    after, before = curve(calibration.probability(CENTERS), *histogram(both)), np.zeros((3, CURVE))
    for _, similarities, right in blocks(both):
        logits = scale * similarities
        probabilities = logits.softmax(dim=1) if bias is None else (logits + bias).sigmoid()
        before += curve(probabilities.numpy().ravel(), (~right).numpy().ravel(), right.numpy().ravel())
    told: dict[str, Any] = {"ece_before": ece(before), "ece_after": ece(after), "curve": after.T.tolist()}
    if calibration.threshold is not None:
        hits, tries = above(both, [calibration.threshold])
        own = torch.bincount(both.matches[0], minlength=len(hits)).double()[:, None]
        told["pairs_above"] = int(tries.sum())
        for name, wholes in (("precision", tries), ("recall", own)):
            if wholes.any():
                found = intervals({name: ratios(hits, wholes)[:, 0]}, int((wholes > 0).sum()))
                told[name] = {"value": (hits.sum() / wholes.sum()).item(), "interval": found[name]}
    return told


def curve(probabilities: np.ndarray, wrong: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pairs, the sum of their probabilities, and those that match, in each bin of probability: (3, CURVE)."""
    bins = np.minimum((probabilities * CURVE).astype(int), CURVE - 1)
    pairs = wrong.astype(np.float64) + right
    return np.stack([np.bincount(bins, one, CURVE) for one in (pairs, pairs * probabilities, right)])


def ece(bins: np.ndarray) -> float:
    """Expected calibration error: how far the probabilities are from the shares that match, over all pairs."""
    pairs, expected, right = bins
    return float(np.abs(expected - right).sum() / pairs.sum())
