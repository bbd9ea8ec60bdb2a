"""What a similarity means: the threshold above which a wanted share of pairs matches, and a probability.

A pair is an image with a caption, or with a class; it matches where the image has it. Half of the images are fitted on,
the others show whether the promise is kept. Intervals resample images: pairs of one image hang together.

N  images      M  candidates: different captions, or classes      P  pairs that match      K  thresholds
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train_clip.checkpoints.found import NO_CHOICE, find_weights, fingerprint
from train_clip.commands.evaluate import load_for_scoring, print_table, write_json
from train_clip.commands.progress import with_progress
from train_clip.errors import UserError
from train_clip.evaluation import embed, zero_shot
from train_clip.evaluation.collect import ScoreOptions, collect, find
from train_clip.files import require_new
from train_clip.losses.tiles import tiles
from train_clip.options import Check, WeightOptions, at_least, option
from train_clip.probes.calibration import CALIBRATION, VERSION, Calibration, beside
from train_clip.probes.extras import extra

THRESHOLDS = 256  # K that are tried: quantiles of the similarities of pairs that match
ROUNDING = 1e-6  # by which sums of the same products may differ
BINS = 2**14  # of similarities in [-1, 1]
CURVE = 15  # bins of probabilities, of equal width (Guo et al. 2017, arXiv 1706.04599, section 5)
RESAMPLES, AT_ONCE = 1000, 100
TAIL = 0.025  # of resamples outside an interval, at each end
INSIDE = Check(lambda value: 0 < value < 1, "above 0 and below 1")


@dataclass(frozen=True)
class CalibrateOptions(ScoreOptions):
    """What to fit on, and what is wanted."""

    precision: float = option(0.95, "fraction of the pairs above the threshold that are to match", INSIDE)
    seed: int = option(0, "decides which half of the images is fitted on", at_least(0))
    backbone: str | None = option(
        None, "for visual prompts: path or name of their backbone; default: the one they were trained with"
    )


def calibrate(checkpoint: str, /, options: CalibrateOptions, weights: WeightOptions = NO_CHOICE) -> dict[str, Any]:
    """Fit the similarity above which a wanted share of pairs matches, and a probability, on held-out pairs.

    Args:
        checkpoint: a checkpoint or a run's folder (its best checkpoint), or weights of OpenAI (ViT-B/32), open_clip or
            Hugging Face: a file, a folder, or hf-hub:NAME
        options: pairs that the model was not trained on, and what is wanted
        weights: values that they do not state
    """
    found = find_weights(checkpoint, weights, options.backbone)
    output = options.json or beside(found.source, CALIBRATION)
    require_new(output)
    model = load_for_scoring(found, options.device)
    collection = collect(model.model, model.tokens, find(options)[0], options, with_progress)
    both = halves(sides(collection), options.seed, every=options.classes is not None)
    if not all(half.matches.numel() for half in both):
        raise UserError(
            f"{len(collection.paths):,} images with a caption or class. Expected some for each half: add more."
        )
    calibration = fit(both[0], options.precision)
    about = {
        "version": VERSION,
        "model": model.model.name,
        "fingerprint": fingerprint(model.model),
        "candidates": f"{len(both[0].candidates):,} {'classes' if options.classes else 'captions'}",
        "images": [len(half.images) for half in both],
        "calibration": asdict(calibration),
        "check": check(both[1], calibration, model.model.logit_scale.exp().item()),
    }
    write_json(output, about)
    report(about)
    print(f"Written to {output}, where `search` and `classify` look for it.")
    return about


class Sides(NamedTuple):
    """Images, candidates, and which of them match."""

    images: Tensor  # (N, D) unit norm
    candidates: Tensor  # (M, D) unit norm
    matches: Tensor  # (2, P) int64: places of an image and of a candidate, each pair once


def sides(collection: embed.Collection) -> Sides:
    """The images and the classes, or the different captions."""
    images = collection.images.cpu()
    if collection.classes:
        texts = zero_shot.class_embeddings(collection.classes, collection.templates, collection.embed_texts)
        return Sides(images, texts.cpu(), torch.stack([torch.arange(len(images)), torch.tensor(collection.labels)]))
    if not collection.captions:
        raise UserError("No captions to calibrate on. Expected images with captions, or --classes.")
    _, first, ids = np.unique(collection.caption_ids.cpu().numpy(), return_index=True, return_inverse=True)
    pairs = torch.stack([torch.tensor(collection.owners), torch.from_numpy(ids)])
    return Sides(images, collection.texts.cpu()[torch.from_numpy(first)], torch.unique(pairs, dim=1))


def halves(both: Sides, seed: int, every: bool) -> list[Sides]:
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
    """Similarities of some images with all candidates, (n, M), and which match, (n, M) bool."""
    for at in tiles(len(both.images), len(both.candidates)):
        similarities = both.images[at] @ both.candidates.T
        own = both.matches[:, (both.matches[0] >= at.start) & (both.matches[0] < at.stop)]
        right = torch.zeros(similarities.shape, dtype=torch.bool)
        right[own[0] - at.start, own[1]] = True
        yield at, similarities, right


def fit(both: Sides, precision: float) -> Calibration:
    """The lowest threshold at which the lower end of the precision's band keeps what is wanted; Platt's scaling.

    A threshold with fewer images above it than could show that, if all of their pairs matched, is not considered.
    """
    own = (both.images[both.matches[0]] * both.candidates[both.matches[1]]).sum(dim=1).numpy()
    thresholds = np.unique(np.quantile(own, np.linspace(0, 1, THRESHOLDS), method="lower")) - ROUNDING
    hits, tries = above(both, thresholds)
    drawn, found = resampled(hits, tries), hits.sum(axis=0) / np.maximum(tries.sum(axis=0), 1)
    enough = (tries > 0).sum(axis=0) >= math.log(TAIL) / math.log(precision)
    # A band for all thresholds at once: the one that is chosen is the luckiest of many.
    spread = np.maximum(drawn.std(axis=0), ROUNDING)
    farthest = ((drawn - found) / spread)[:, enough].max(axis=1, initial=0)
    kept = enough & (found - np.quantile(farthest, 1 - TAIL) * spread >= precision)
    threshold = float(thresholds[kept][0]) if kept.any() else None
    return Calibration(threshold, precision, *platt(histogram(both)))


def above(both: Sides, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each image, the pairs that match, and all pairs, at or above each rising threshold: (N, K) float64 both."""
    counts = np.zeros((2, len(both.images), len(thresholds) + 1))
    for at, similarities, right in blocks(both):
        places = torch.bucketize(similarities.double(), torch.from_numpy(thresholds), right=True)
        places += torch.arange(len(places))[:, None] * (len(thresholds) + 1)
        for count, some in zip(counts, (places[right], places.flatten()), strict=True):
            count[at] = torch.bincount(some, minlength=right.shape[0] * count.shape[1]).view(-1, count.shape[1])
    hits, tries = counts[:, :, ::-1].cumsum(axis=2)[:, :, -2::-1]
    return hits, tries


def resampled(parts: np.ndarray, wholes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Σ parts / Σ wholes, of (N, K), over as many images drawn with repetition: (RESAMPLES, K); 0 of nothing is 0."""
    rng, number = np.random.default_rng(seed), len(parts)
    drawn = list[np.ndarray]()
    for _ in range(RESAMPLES // AT_ONCE):
        times = rng.multinomial(number, np.full(number, 1 / number), AT_ONCE).astype(np.float64)
        drawn.append(times @ parts / np.maximum(times @ wholes, 1e-300))
    return np.concatenate(drawn)


def interval(parts: np.ndarray, wholes: np.ndarray) -> list[float]:
    """The 95% interval of Σ parts / Σ wholes over images, of (N,)."""
    return np.quantile(resampled(parts[:, None], wholes[:, None]), (TAIL, 1 - TAIL)).tolist()


def histogram(both: Sides) -> np.ndarray:
    """How many pairs do not match, and do, by similarity: (2, BINS)."""
    counts = torch.zeros(2, BINS, dtype=torch.long)
    for _, similarities, right in blocks(both):
        bins = ((similarities.double() + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        counts = counts + torch.stack([torch.bincount(bins[right == is_right], minlength=BINS) for is_right in (0, 1)])
    return counts.numpy().astype(np.float64)


def centers() -> np.ndarray:
    """The similarities in the middle of the bins."""
    return (np.arange(BINS) + 0.5) * (2 / BINS) - 1


def platt(counts: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the logistic function of a similarity, its targets a little off 0 and 1 (Platt 1999)."""
    some = counts.sum(axis=0) > 0
    wrong, right = counts[:, some]
    smooth = (1 / (wrong.sum() + 2), (right.sum() + 1) / (right.sum() + 2))
    ones = wrong * smooth[0] + right * smooth[1]
    x = centers()[some]
    middle, spread = x.mean(), x.std() or 1.0
    model = extra("sklearn.linear_model").LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8)
    targets = np.repeat([0, 1], len(x))
    model.fit(np.tile((x - middle) / spread, 2)[:, None], targets, np.concatenate([wrong + right - ones, ones]))
    slope = model.coef_.item() / spread
    return slope, model.intercept_.item() - slope * middle


def check(both: Sides, calibration: Calibration, scale: float) -> dict[str, Any]:
    """What the calibration keeps on other images: precision and recall with intervals; curves before and after."""
    counts = histogram(both)
    after = curve(calibration.probability(centers()), *counts)
    before = np.zeros((3, CURVE))
    for _, similarities, right in blocks(both):
        probabilities = (scale * similarities.double()).softmax(dim=1)
        before += curve(probabilities.numpy().ravel(), (~right).numpy().ravel(), right.numpy().ravel())
    told: dict[str, Any] = {"ece_before": ece(before), "ece_after": ece(after), "curve": after.T.tolist()}
    if calibration.threshold is not None:
        hits, tries = (one[:, 0] for one in above(both, np.array([calibration.threshold])))
        own = np.bincount(both.matches[0].numpy(), minlength=len(hits)).astype(np.float64)
        told["pairs_above"] = int(tries.sum())
        for name, wholes in (("precision", tries), ("recall", own)):
            if wholes.any():
                told[name] = {"value": hits.sum() / wholes.sum(), "interval": interval(hits, wholes)}
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


def report(about: dict[str, Any]) -> None:
    """Print what was fitted, and what it keeps."""
    calibration, told = about["calibration"], about["check"]
    print(
        f"Fitted on {about['images'][0]:,} images and {about['candidates']}, checked on {about['images'][1]:,} others."
    )
    if calibration["threshold"] is None:
        print(
            f"No threshold surely keeps a precision of {calibration['precision']:.1%}: use more pairs, or a lower one."
        )
    else:
        print(f"Threshold for a precision of {calibration['precision']:.1%}: similarity {calibration['threshold']:.4f}")
        for name in [name for name in ("precision", "recall") if name in told]:
            low, high = told[name]["interval"]
            print(f"  {name} on the others: {told[name]['value']:.1%} (95% interval {low:.1%} to {high:.1%})")
    print(f"Calibration error: {told['ece_before']:.2%} by the model's softmax, {told['ece_after']:.2%} calibrated")
    filled = [one for one in told["curve"] if one[0]]
    rows = [[f"{expected / pairs:.1%}", f"{right / pairs:.1%}", f"{pairs:,.0f}"] for pairs, expected, right in filled]
    print_table([["probability", "match", "pairs"], *rows])
