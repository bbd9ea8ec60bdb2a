"""Heads that classify by what an image tower gives: fitted in seconds, and kept in a file without code.

N  images      C  classes      F  width of the features      D  embedding width      M  images that a head keeps

    zero-shot    s f·t
    linear       x W + b: logistic regression on the features x (CLIP paper, A.3)
    tip-adapter  s f·t + α Σ_m exp(-β (1 - f·k_m)) over the kept images k_m of the class (arXiv 2207.09519, eq. 4)
    prolip       s n(z + x Δ)·t, fitted as cross-entropy + λ ‖Δ‖²: the projection, drawn to its start (arXiv 2410.05270)

f = n(z) are the embeddings z at unit norm, t those of the classes, s is the model's scale.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.load import Pretrained
from train_clip.errors import MissingFile, UserError, first_line
from train_clip.evaluation.embed import embed_texts, evaluating
from train_clip.evaluation.zero_shot import class_embeddings
from train_clip.files import replacing
from train_clip.losses.tiles import tiles
from train_clip.models.clip import DualEncoder, unit_norm
from train_clip.optional import optional
from train_clip.probes.features import Encoded, tapped

FORMAT = "train-clip head, version 1"
LAMBDAS = np.logspace(-6, 6, 97).tolist()  # 96 steps of an eighth of a decade (CLIP paper, A.3)
LAMBDA_STEPS = (16, 8, 4, 2, 1)  # of them: two decades at first, then half as many about the best
MAX_ITERATIONS = 1000  # CLIP paper, A.3
STEPS = 200  # of L-BFGS, for ProLIP
# What is tried on validation, that of the papers first where there is one.
GRIDS: dict[str, list[dict[str, float]]] = {
    "zero-shot": [{}],
    "tip-adapter": [{"alpha": a, "beta": b} for a, b in product((1, 0.5, 2, 5, 10), (5.5, 1, 2.5, 10))],
    "prolip": [{"lambda": pull} for pull in (10, 1, 0.1, 0.01, 0.001)],
}

Tensors = dict[str, Tensor]
Values = dict[str, float]


@dataclass(frozen=True)
class Head:
    """What maps encoded images to logits: a kind, its tensors, and the values that were chosen for it."""

    kind: str
    tensors: Tensors
    values: Values

    def logits(self, images: Encoded) -> Tensor:
        """(N, C) float64; their softmax is the probability of each class."""
        features, embeddings, held = images.features.double(), images.embeddings.double(), self.tensors
        if self.kind == "linear":
            return features @ held["weight"].T + held["bias"]
        if self.kind == "prolip":
            embeddings = embeddings + features @ held["change"]
        logits = self.values["scale"] * unit_norm(embeddings) @ held["texts"].T
        if self.kind == "tip-adapter":
            for at in tiles(len(logits), len(held["keys"])):
                near = (self.values["beta"] * (unit_norm(embeddings[at]) @ held["keys"].T - 1)).exp()
                logits[at] = logits[at].index_add(1, held["labels"], near, alpha=self.values["alpha"])
        return logits

    def hits(self, images: Encoded, labels: Tensor) -> Tensor:
        """(N,) float64: 1 where the most likely class is the image's."""
        return (self.logits(images).argmax(dim=1) == labels).double()


@dataclass(frozen=True)
class Task:
    """What heads are fitted on: encoded images and their (N,) classes, and the classes' texts."""

    images: Encoded
    labels: Tensor
    texts: Tensor  # (C, D) float64, unit norm
    scale: float  # s


def by_name(model: Pretrained, classes: list[str], templates: list[str]) -> Head:
    """The zero-shot head of a model."""
    texts = class_embeddings(classes, templates, lambda some: embed_texts(model.model, some, model.tokens))
    return Head("zero-shot", {"texts": texts.cpu().double()}, {"scale": model.model.logit_scale.exp().item()})


def choose(kind: str, task: Task, val: Encoded, val_labels: Tensor) -> Head:
    """Fit a kind of head with the values that are best on validation images: by top-1, where equal by cross-entropy.

    For the linear one, λ is found as in the paper: in ever smaller steps about the peak.
    """

    def score(head: Head) -> tuple[float, float]:
        logits = head.logits(val)
        return head.hits(val, val_labels).mean().item(), -functional.cross_entropy(logits, val_labels).item()

    if kind != "linear":
        return max((FITS[kind](task, values) for values in GRIDS[kind]), key=score)
    heads, best = dict[int, Head](), 0
    for step in LAMBDA_STEPS:
        places = (best - step, best + step) if heads else range(0, len(LAMBDAS), step)
        heads |= {place: fit_linear(task, {"lambda": LAMBDAS[place]}) for place in places if 0 <= place < len(LAMBDAS)}
        best = max(heads, key=lambda place: score(heads[place]))
    return heads[best]


def fit_linear(task: Task, values: Values) -> Head:
    """Minimum of the summed cross-entropy + λ/2 ‖W‖², by scikit-learn's L-BFGS; every class has an image."""
    sklearn, linear_model = (optional(name, "A linear probe") for name in ("sklearn", "sklearn.linear_model"))
    model = linear_model.LogisticRegression(C=1 / values["lambda"], max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # As in the paper: what those iterations reach counts.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        model.fit(task.images.features.double().numpy(), task.labels.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(bias) == 1:  # two classes: the logit of the second, that of the first being 0
        weight, bias = torch.cat([weight * 0, weight]), torch.cat([bias * 0, bias])
    return Head("linear", {"weight": weight, "bias": bias}, values)


def fit_tip_adapter(task: Task, values: Values) -> Head:
    """Keep the images."""
    keys = unit_norm(task.images.embeddings.double())
    return Head(
        "tip-adapter", {"texts": task.texts, "keys": keys, "labels": task.labels}, {"scale": task.scale, **values}
    )


def fit_prolip(task: Task, values: Values) -> Head:
    """Minimum over Δ, (F, D), from 0, of the mean cross-entropy + λ ‖Δ‖², by L-BFGS."""
    size = task.images.features.shape[1], task.images.embeddings.shape[1]
    change = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    head = Head("prolip", {"texts": task.texts, "change": change}, {"scale": task.scale, **values})
    optimizer = torch.optim.LBFGS([change], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        cross_entropy = functional.cross_entropy(head.logits(task.images), task.labels)
        value = cross_entropy + values["lambda"] * change.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    change.requires_grad_(False)
    return head


FITS: dict[str, Callable[[Task, Values], Head]] = {
    "zero-shot": lambda task, _: Head("zero-shot", {"texts": task.texts}, {"scale": task.scale}),
    "linear": fit_linear,
    "tip-adapter": fit_tip_adapter,
    "prolip": fit_prolip,
}


def write_head(path: Path, head: Head, classes: list[str], model: DualEncoder) -> None:
    """Write a head: a safetensors file whose metadata is JSON, complete or not at all."""
    from safetensors.torch import save_file

    about = {"kind": head.kind, "values": head.values, "classes": classes, "fingerprint": fingerprint(model)}
    with replacing(path) as beside:
        save_file({name: one.contiguous() for name, one in head.tensors.items()}, beside, {FORMAT: json.dumps(about)})


def read_head(path: Path, model: DualEncoder) -> tuple[Head, list[str]]:
    """Read a head and its classes; one of another model, or that is damaged, is refused."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingFile(f"{path}: there is no such file. Expected a head that `train-clip probe --save` wrote.")
    try:
        with safe_open(path, "pt") as file:
            about: Any = json.loads((file.metadata() or {})[FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        values = {name: float(value) for name, value in about["values"].items()}
        head = Head(about["kind"], tensors, values)
        classes, of = list(map(str, about["classes"])), about["fingerprint"]
        if of != fingerprint(model):
            raise UserError(f"{path}: of another model than {model.name}. Expected the model that it was fitted on.")
        with tapped(model) as taken, evaluating(model):
            black = torch.zeros(1, 3, model.image_size, model.image_size, device=model.logit_scale.device)
            embeddings = model.encode_image(black).cpu()
        found = head.logits(Encoded(taken[0].cpu(), embeddings))
        if head.kind not in FITS or found.shape != (1, len(classes)):
            raise ValueError(f"logits of {found.shape[1]:,} classes")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path}: no head that `train-clip probe --save` wrote, or damaged ({first_line(error)}). Write it again."
        ) from None
    return head, classes
