"""Zero-shot classification (CLIP paper, section 3.1): a class is the mean of its captions' embeddings.

N  images      C  classes      T  templates      D  embedding width
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train_clip.data import pairs
from train_clip.data.tokenizer import is_empty
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.embed import Collection, require_finite
from train_clip.losses.softmax import ranks
from train_clip.losses.tiles import tiles
from train_clip.printing import Intervals, interval

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # CLIP paper, section 3.1.4
# CLIP's sets, a file each (MIT License, OpenAI; github.com/openai/CLIP: data/prompts.md; ImageNet's:
# notebooks/Prompt_Engineering_for_ImageNet.ipynb).
TEMPLATES = {file.stem: file for file in sorted(Path(__file__).with_name("templates").glob("*.txt"))}
PREFIX = "zero-shot "  # of its figures' names
TOP1, TOP5, MEAN = (PREFIX + name for name in ("top-1", "top-5", "mean per class"))
NONE = torch.empty(0, dtype=torch.long)
CAPTIONS_AT_ONCE = 4096  # of classes: what is held of them at a time, or all of one class
# A line of JSON or Python: in quotes; with a key in quotes; or with a bracket before anything but a template's.
DATA = re.compile(r"""(["']).*\1,?|(["']).*\2\s*:.*|[\[{]\s*(["'\[{\d-].*)?""")


@dataclass(frozen=True)
class ZeroShot:
    """Accuracies in [0, 1]."""

    top1: float  # images whose most similar class is theirs
    top5: float | None  # images whose class is among the five most similar; None for five classes or fewer
    mean_per_class: float  # top-1 of each class, averaged over the classes that have images
    chance: float  # top-1 of a guess, 1 / C, and its mean per class; of top-5 it is five times that
    num_images: int
    num_classes: int
    per_class: dict[str, float] = field(default_factory=dict)  # top-1 of each class that has images
    intervals: Intervals = field(default_factory=dict)
    places: torch.Tensor = field(default=NONE, compare=False, repr=False)  # (N,) how many classes stand before theirs
    labels: torch.Tensor = field(default=NONE, compare=False, repr=False)  # (N,) their classes
    classes: torch.Tensor = field(default=NONE, compare=False, repr=False)  # (C, D) the classes' embeddings

    def rows(self) -> str:
        """A line to be printed."""
        shares = [
            f"{name.removeprefix(PREFIX)} {share:.1%} {interval(self.intervals.get(name))}".rstrip()
            + f" (chance {self.chance * (5 if name == TOP5 else 1):.1%})"
            for name, share in self.figures().items()
        ]
        return f"zero-shot over {self.num_classes:,} classes: {', '.join(shares)}"

    def figures(self) -> dict[str, float]:
        """The scores to compare with other models."""
        shares = {TOP1: self.top1, TOP5: self.top5, MEAN: self.mean_per_class}
        return {name: share for name, share in shares.items() if share is not None}


def score_classes(collection: Collection) -> ZeroShot | None:
    """Score the collection's images against its classes, where each image has one."""
    if not collection.labels:
        return None
    classes = class_embeddings(collection.classes, collection.templates, collection.embed_texts)
    labels = torch.tensor(collection.labels, device=collection.images.device)
    return zero_shot(collection.images, labels, classes, collection.classes)


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


def zero_shot(images: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, names: Sequence[str] = ()) -> ZeroShot:
    """Score (N, D) images by their (N,) labels against (C, D) classes, of unit norm; ties and NaN count against.

    ``names`` are those of the C classes in ``per_class``; default: their numbers.
    """
    numbers = torch.arange(len(classes), device=labels.device)
    places = torch.empty_like(labels)
    for at in tiles(len(images), len(classes)):
        places[at] = ranks(images[at], classes, labels[at, None] == numbers)
    # On the CPU: some devices (MPS) have no float64.
    places, labels = places.cpu(), labels.cpu()
    hits = (places < 1).double()
    right, counts = (torch.bincount(labels, weights, len(classes)) for weights in (hits, torch.ones_like(hits)))
    shares, numbered = (right / counts).tolist(), enumerate(names or map(str, range(len(classes))))
    per_class = {name: shares[place] for place, name in numbered if counts[place] > 0}
    return ZeroShot(
        top1=hits.mean().item(),
        top5=(places < 5).double().mean().item() if len(classes) > 5 else None,
        mean_per_class=sum(per_class.values()) / len(per_class),
        chance=1 / len(classes),
        num_images=len(images),
        num_classes=len(classes),
        per_class=per_class,
        places=places,
        labels=labels,
        classes=classes,
    )


def templates_file(path: Path) -> Path:
    """A file of templates, or that of one of CLIP's sets by its name."""
    if not path.exists() and str(path) not in TEMPLATES:
        raise UserError(f"{path}: neither a file nor a set of templates. Sets: {', '.join(TEMPLATES)}.")
    return path if path.exists() else TEMPLATES[str(path)]


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
    return [labels[0] for labels in label_sets(paths, classes, lambda path: [class_name(path)])]


def label_sets(
    paths: list[str], classes: list[str], named: Callable[[Path], list[str]], by: str = ""
) -> list[list[int]]:
    """The places of each image's classes, as ``image_labels``: of what it is said to be, and by what where no file."""
    places = {_plain(name): place for place, name in enumerate(classes)}
    num_numbered = 0 if any(map(str.isdecimal, places)) else len(places)
    return [
        list(dict.fromkeys(_label(path, name, by, places, num_numbered) for name in named(path)))
        for path in map(Path, paths)
    ]


def class_name(path: Path) -> str:
    """What the ``.cls`` file beside an image says, or else the name of its folder."""
    names = class_names(path)
    if len(names) > 1:
        raise UserError(
            f"{path.with_suffix('.cls')}: {len(names):,} lines. Expected one, the name or number of a class."
        )
    return names[0]


def class_names(path: Path) -> list[str]:
    """The lines of the ``.cls`` file beside an image, or else the name of its folder."""
    label_file = path.with_suffix(".cls")
    if not label_file.is_file():
        return [path.parent.name]
    return _read(pairs.read_caption_lines, label_file, "the name or number of a class")[0]


def _read(how: Any, path: Path, expected: str) -> Any:
    try:
        return how(str(path))
    except BadSample as bad:
        raise UserError(f"{path}: {bad.reason.removeprefix('caption ')}. Expected {expected}, in UTF-8.") from None


def _label(path: Path, named: str, by: str, places: dict[str, int], num_numbered: int) -> int:
    label_file = path.with_suffix(".cls")
    if (place := places.get(_plain(named))) is not None:
        return place
    source = by or f"its folder ({path.parent})"
    if by or label_file.is_file():
        if named.isdecimal() and int(named) < num_numbered:
            return int(named)
        source = by or str(label_file)
    advice = f"name the folder after it, or write {label_file.name} with its name or number"
    raise UserError(
        f"{path}: its class is {named!r} by {source}, which is not one of the {len(places)} classes. Expected one of "
        f"them, such as {next(iter(places))!r}. Add the class to the list, "
        f"{'or name another column' if by else advice}."
    )


def _plain(name: str) -> str:
    return " ".join(pairs.plain_name(name).replace("_", " ").replace("\ufeff", "").casefold().split())
