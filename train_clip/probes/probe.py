"""How well images of classes are told apart by what a model gives of them: all of them, or a few of each class."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from train_clip.checkpoints.found import NO_CHOICE, find_weights
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.evaluate import load_for_scoring, print_table, write_json
from train_clip.data.pairs import PairList, plain_name
from train_clip.data.samples import Skip
from train_clip.errors import UsageError, UserError
from train_clip.evaluation import zero_shot
from train_clip.evaluation.collect import read_classes, require_different
from train_clip.files import require_new, require_place
from train_clip.optional import optional
from train_clip.options import WeightOptions, at_least, option
from train_clip.printing import printable
from train_clip.probes.calibration import beside
from train_clip.probes.features import Encoded, encode
from train_clip.probes.heads import FITS, Task, by_name, choose, write_head
from train_clip.probes.images import ClassOptions, find_images
from train_clip.scores.bootstrap import intervals, ratios

TEST_SHARE = 0.2  # of each class
VAL_SHARE = 0.2  # of what is not for testing, to choose values by, where all images are used
VAL_SHOTS = 4  # per class at most, where few are: as many as in training (CoOp, arXiv 2109.01134)
ALL_IMAGES = ("zero-shot", "linear")  # heads of all images; the others are for few
HEAD = "head.safetensors"


@dataclass(frozen=True)
class ProbeOptions(ClassOptions):
    """What to fit heads on."""

    shots: int | None = option(None, "training images per class, drawn at random; default: all", at_least(1))
    draws: int = option(3, "how often --shots images are drawn; accuracies are means", at_least(1))
    seed: int = option(0, "decides which images are drawn", at_least(0))
    save: Literal["linear", "tip-adapter", "prolip"] | None = option(
        None, "write this head, of the first draw, for `train-clip classify --head`"
    )
    output: Path | None = option(None, "file for the head; default: CHECKPOINT.head.safetensors, beside the checkpoint")
    json: Path | None = option(None, "file to write the accuracies to")


def probe(checkpoint: str, /, options: ProbeOptions, weights: WeightOptions = NO_CHOICE) -> dict[str, Any]:
    """Fit a linear probe and few-shot heads on a frozen model's images of classes, and test them.

    Args:
        checkpoint: a checkpoint or a run's folder (its best checkpoint), or weights of OpenAI (ViT-B/32), open_clip or
            Hugging Face: a file, a folder, or hf-hub:NAME
        options: on which images
        weights: values that they do not state
    """
    _require_used(options)
    optional("sklearn.linear_model", "A linear probe")
    found = find_weights(checkpoint, weights, options.backbone)
    output = options.output or beside(found.source, HEAD)
    if options.save:
        require_new(output)
    for target in filter(None, (options.json, options.save and output)):
        require_place(target)
    model = load_for_scoring(found, options.device)
    pairs, root = find_images(options)
    names = [plain_name(name.removeprefix(root)) for name in pairs.names]
    classes, templates = read_classes(options)
    require_different(model.model, model.tokens, classes, templates, options.classes)
    paths = [pair.image for pair in pairs]
    classes = classes or sorted({zero_shot.class_name(Path(path)).replace("_", " ") for path in paths})
    if len(classes) < 2:
        raise UserError(f"{paths[0]}: all images are of the class {classes[0]!r}. Expected at least 2 classes.")
    labels = zero_shot.image_labels(paths, classes)
    divide(names, labels, classes, options, 0)  # which refuses a class of too few before any image is read
    images, kept, skips = _embed(model, pairs, options)
    ids = torch.tensor([labels[place] for place in kept])
    named = by_name(model, classes, templates)
    every = Task(images, ids, named.tensors["texts"], named.values["scale"])
    by_draw, tested = list[dict[str, Any]](), dict[str, list[torch.Tensor]]()
    for draw in range(options.draws if options.shots else 1):
        train, val, test = divide([names[place] for place in kept], ids.tolist(), classes, options, draw)
        heads = fit_all(every, train, val, options.shots is None)
        for kind, head in heads.items():
            tested.setdefault(kind, []).append(head.hits(images.take(test), ids[test]))
        by_draw.append({kind: head.values for kind, head in heads.items()})
        if options.save and draw == 0:
            write_head(output, heads[options.save], classes, model.model)
    scores = {
        "classes": len(classes),
        "shots": options.shots,
        "images": {"training": len(train), "validation": len(val), "test": len(test), "unreadable": len(skips)},
        "chance": 1 / len(classes),
        "heads": {kind: _figures(torch.stack(hits)) for kind, hits in tested.items()},
        "values": by_draw,
        "skips": skips,
    }
    if options.json is not None:
        write_json(options.json, scores)
    report(scores)
    if options.save:
        print(f"{options.save}: {output}. Next: train-clip classify {checkpoint} --head {output} --folder FOLDER")
    return scores


def _require_used(options: ProbeOptions) -> None:
    if options.save and not options.shots and options.save not in ALL_IMAGES:
        raise UsageError(f"--save {options.save}: a head for few images of each class. Expected --shots with it.")
    if options.output and not options.save:
        raise UsageError(f"--output {options.output}: no head is written. Expected --save with it, or no --output.")
    if options.draws != ProbeOptions.draws and not options.shots:
        raise UsageError(f"--draws {options.draws}: all images are used. Expected --shots with it, or no --draws.")


def _embed(model: Pretrained, pairs: PairList, options: ProbeOptions) -> tuple[Encoded, list[int], list[Skip]]:
    parts, kept, skips = list[Encoded](), list[int](), list[Skip]()
    for places, rows, bad in encode(model, pairs, options):
        skips += bad
        kept += places
        parts += [rows] * bool(places)
    if not kept:
        raise UserError(f"{skips[0].path}: {skips[0].reason}; none of the {len(pairs):,} images can be read.")
    return Encoded(*map(torch.cat, zip(*parts, strict=True))), kept, skips


def fit_all(every: Task, train: list[int], val: list[int], join: bool) -> dict[str, Any]:
    """A head of each kind; where ``join``, those of all images, fitted again on training and validation together."""

    def of(rows: list[int]) -> Task:
        return Task(every.images.take(rows), every.labels[rows], every.texts, every.scale)

    kinds = ALL_IMAGES if join else FITS
    heads = {kind: choose(kind, of(train), every.images.take(val), every.labels[val]) for kind in kinds}
    return {kind: FITS[kind](of(train + val), head.values) for kind, head in heads.items()} if join else heads


def divide(
    names: list[str], labels: list[int], classes: list[str], options: ProbeOptions, draw: int
) -> tuple[list[int], list[int], list[int]]:
    """Places of the training, validation and test images: those by seed and draw, these by a hash of their names.

    Test are round(TEST_SHARE · n) of a class's n images, at least one; of the others, k are drawn for training and up
    to four for validation, or all, a fifth of them for validation.
    """
    members = defaultdict[int, list[int]](list)
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    for place in sorted(range(len(names)), key=digests.__getitem__):
        members[labels[place]].append(place)
    rng, shots = np.random.default_rng((options.seed, draw)), options.shots
    train, val, test = list[int](), list[int](), list[int]()
    for label, name in enumerate(classes):
        own = members[label]
        number = max(1, round(TEST_SHARE * len(own)))
        test += own[:number]
        rest = rng.permutation(own[number:]).astype(int).tolist()
        chosen = min(shots, VAL_SHOTS) if shots else max(1, round(VAL_SHARE * len(rest)))
        if len(rest) < (shots or 1) + 1:
            raise UserError(
                f"{printable(name)}: {len(own):,} images, {number} of them to test on. Expected at least "
                f"{(shots or 1) + 1} more, one of them to choose values by. Use fewer --shots, or leave the class out."
            )
        shots_of = shots or len(rest) - chosen
        train, val = train + rest[:shots_of], val + rest[shots_of : shots_of + chosen]
    return train, val, test


def _figures(hits: torch.Tensor) -> dict[str, Any]:
    # Of (draws, N): images are resampled, each with all its draws.
    by_draw, by_image = hits.mean(dim=1), hits.mean(dim=0)[:, None]
    return {
        "top1": hits.mean().item(),
        "interval": intervals({"": ratios(by_image, torch.ones_like(by_image))[:, 0]}, len(by_image))[""],
        "by_draw": by_draw.tolist(),
        "deviation": by_draw.std(correction=len(by_draw) > 1).item(),
    }


def report(scores: dict[str, Any]) -> None:
    """Print the accuracies next to chance."""
    counts = ", ".join(f"{number:,} {name}" for name, number in scores["images"].items())
    print(f"{scores['classes']:,} classes, chance {scores['chance']:.1%}; images: {counts}")
    rows = [["head", "top-1", "95% interval", "deviation over draws"]]
    for kind, of in scores["heads"].items():
        low, high = of["interval"]
        rows.append([kind, f"{of['top1']:.1%}", f"{low:.1%} to {high:.1%}", f"{of['deviation']:.1%}"])
    print_table(rows)
