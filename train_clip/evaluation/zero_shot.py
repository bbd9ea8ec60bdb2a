"""Zero-shot classification (CLIP paper, section 3.1): a class is the mean of its captions' embeddings.

N  images      C  classes      T  templates      D  embedding width
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_clip.data import pairs
from train_clip.data.tokenizer import is_empty
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.embed import Collection, require_finite
from train_clip.losses.softmax import ranks
from train_clip.losses.tiles import tiles

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # CLIP paper, section 3.1.4
CAPTIONS_AT_ONCE = 4096  # of classes: what is held of them at a time, or all of one class
# A line of JSON or Python: in quotes; with a key in quotes; or with a bracket before anything but a template's.
DATA = re.compile(r"""(["']).*\1,?|(["']).*\2\s*:.*|[\[{]\s*(["'\[{\d-].*)?""")


@dataclass(frozen=True)
class ZeroShot:
    """Accuracies in [0, 1]."""

    top1: float  # images whose most similar class is theirs
    top5: float | None  # images whose class is among the five most similar; None for five classes or fewer
    mean_per_class: float  # top-1 of each class, averaged over the classes that have images
    chance: float  # top-1 of a guess, 1 / C
    num_images: int
    num_classes: int

    def rows(self) -> str:
        """A line to be printed."""
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.1%}, "
        return (
            f"zero-shot over {self.num_classes} classes: top-1 {self.top1:.1%} (chance {self.chance:.1%}), {top5}mean "
            f"per class {self.mean_per_class:.1%}"
        )

    def figures(self) -> dict[str, float]:
        """The scores to compare with other models."""
        return {"zero-shot top-1": self.top1}


def score_classes(collection: Collection) -> ZeroShot | None:
    """Score the collection's images against its classes, where it has any."""
    if not collection.classes:
        return None
    classes = class_embeddings(collection.classes, collection.templates, collection.embed_texts)
    return zero_shot(collection.images, torch.tensor(collection.labels, device=collection.images.device), classes)


def class_embeddings(classes: list[str], templates: list[str], embed_texts: Any) -> torch.Tensor:
    """Embed the classes, (C, D) float of unit norm: encode and normalize each template, average, normalize again.

    ``templates`` have ``{}`` where the name goes; ``embed_texts`` maps n strings to (n, D) of unit norm.
    """
    at_once = max(1, CAPTIONS_AT_ONCE // len(templates))
    means = list[torch.Tensor]()
    for start in range(0, len(classes), at_once):
        names = classes[start : start + at_once]
        embeddings = embed_texts([template.replace("{}", name) for name in names for template in templates])
        means.append(embeddings.unflatten(0, (len(names), len(templates))).mean(dim=1))
    found = torch.nn.functional.normalize(torch.cat(means), dim=-1)
    require_finite(found, classes, "classes")
    return found


def zero_shot(images: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor) -> ZeroShot:
    """Score (N, D) images by their (N,) labels against (C, D) classes, of unit norm; ties and NaN count against."""
    numbers = torch.arange(len(classes), device=labels.device)
    places = torch.empty_like(labels)
    for at in tiles(len(images), len(classes)):
        places[at] = ranks(images[at], classes, labels[at, None] == numbers)
    # On the CPU: some devices (MPS) have no float64.
    places, labels = places.cpu(), labels.cpu()
    hits = (places < 1).double()
    right, counts = (torch.bincount(labels, weights, len(classes)) for weights in (hits, torch.ones_like(hits)))
    return ZeroShot(
        top1=hits.mean().item(),
        top5=(places < 5).double().mean().item() if len(classes) > 5 else None,
        mean_per_class=(right / counts)[counts > 0].mean().item(),
        chance=1 / len(classes),
        num_images=len(images),
        num_classes=len(classes),
    )


def read_list(path: Path) -> list[str]:
    """Read class names, or templates, one a line. As classes are numbered by their lines, none is passed over."""
    text = _read(pairs.read_captions, path, "class names, or templates with {}, one per line")
    lines, first = re.split("\r\n?|\n", text.removeprefix(pairs.MARK).rstrip()), dict[str, int]()
    for number, line in enumerate(map(str.strip, lines), 1):
        if (earlier := first.setdefault(_plain(line), number)) != number or is_empty(line) or DATA.fullmatch(line):
            again = f", as in line {earlier}" if earlier != number else ""
            raise UserError(
                f"{path}, line {number}: {line!r}{again}. Expected a class name or a template with {{}} in each line: "
                "none blank, repeated or JSON, as numbers of classes count the lines from 0."
            )
    return [line.strip("\ufeff").strip() for line in lines]


def image_labels(paths: list[str], classes: list[str]) -> list[int]:
    """The place of each image's class: what ``STEM.cls`` says, by name or place from 0, or else its folder's name.

    Case, and underscores for blanks, make no difference. Where a class has a number for a name, numbers are names only.
    """
    places = {_plain(name): place for place, name in enumerate(classes)}
    num_numbered = 0 if any(map(str.isdecimal, places)) else len(places)
    return [_label(Path(path), places, num_numbered) for path in paths]


def class_name(path: Path) -> str:
    """What the ``.cls`` file beside an image says, or else the name of its folder."""
    label_file = path.with_suffix(".cls")
    if not label_file.is_file():
        return path.parent.name
    names, _ = _read(pairs.read_caption_lines, label_file, "the name or number of a class")
    if len(names) > 1:
        raise UserError(f"{label_file}: {len(names):,} lines. Expected one, the name or number of a class.")
    return names[0]


def _read(how: Any, path: Path, expected: str) -> Any:
    try:
        return how(str(path))
    except BadSample as bad:
        raise UserError(f"{path}: {bad.reason.removeprefix('caption ')}. Expected {expected}, in UTF-8.") from None


def _label(path: Path, places: dict[str, int], num_numbered: int) -> int:
    label_file, named = path.with_suffix(".cls"), class_name(path)
    if (place := places.get(_plain(named))) is not None:
        return place
    source = f"its folder ({path.parent})"
    if label_file.is_file():
        if named.isdecimal() and int(named) < num_numbered:
            return int(named)
        source = str(label_file)
    raise UserError(
        f"{path}: its class is {named!r} by {source}, which is not one of the {len(places)} classes. Expected one of "
        f"them, such as {next(iter(places))!r}. Add the class to the list, name the folder after it, or write "
        f"{label_file.name} with its name or number."
    )


def _plain(name: str) -> str:
    return " ".join(pairs.plain_name(name).replace("_", " ").replace("\ufeff", "").casefold().split())
