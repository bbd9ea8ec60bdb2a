"""Images → their classes: a row an image, with the five most likely and their probabilities."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train_clip.checkpoints.found import NO_CHOICE, find_weights
from train_clip.commands.evaluate import NAMED, load_for_scoring
from train_clip.data.samples import Skip
from train_clip.errors import UsageError
from train_clip.evaluation.collect import read_classes, require_different
from train_clip.files import require_new
from train_clip.options import WeightOptions, option
from train_clip.printing import printable
from train_clip.probes.calibration import CLASSES, NOTHING, Calibration, find_calibration
from train_clip.probes.features import Encoded, encode
from train_clip.probes.heads import Head, by_name, read_head
from train_clip.probes.images import ClassOptions, find_images
from train_clip.probes.rows import FORMATS, Row, require_format, rows_to

SHOWN = 5  # classes of a row
KINDS: dict[str, type] = {"class": str, "probability": float}
TOP = {f"{what}_{place}": kind for place in range(1, SHOWN + 1) for what, kind in KINDS.items()}
COLUMNS: dict[str, type] = {"path": str, **KINDS, "match": float, "note": str, **TOP}
EMPTY: Row = dict.fromkeys(COLUMNS)


@dataclass(frozen=True)
class ClassifyOptions(ClassOptions):
    """The images, and what to classify them by."""

    head: Path | None = option(None, "a head that `train-clip probe --save` wrote, in place of --classes")
    calibration: Path | None = option(
        None, "what `evaluate --calibrate --classes` wrote; default: that beside the checkpoint, if it is there"
    )
    output: Path = option(Path("classes.csv"), "file to write: .csv or .parquet")


def classify(checkpoint: str, /, options: ClassifyOptions, weights: WeightOptions = NO_CHOICE) -> Path:
    """Write the class of every image of a folder or table, by class names or by a head that was fitted.

    Args:
        checkpoint: a checkpoint or a run's folder (its best checkpoint), or weights of OpenAI (ViT-B/32), open_clip or
            Hugging Face: a file, a folder, or hf-hub:NAME
        options: which images, and by what
        weights: values that they do not state
    """
    output = options.output
    if (options.head is None) == (options.classes is None):
        raise UsageError("Classes come from one of --classes FILE and --head FILE. Expected one of the two.")
    if options.head and options.calibration:
        raise UsageError("--calibration is for --classes; a head has probabilities of its own. Leave it out.")
    require_format(output, FORMATS, "a table")
    require_new(output)
    weight_file = find_weights(checkpoint, weights, options.backbone)
    model = load_for_scoring(weight_file, options.device)
    calibration = None
    if options.head:
        head, classes = read_head(options.head, model.model)
    else:
        classes, templates = read_classes(options)
        require_different(model.model, model.tokens, classes, templates, options.classes)
        head = by_name(model, classes, templates)
        calibration = find_calibration(model.model, weight_file.source, CLASSES, options.calibration)
    pairs, lost, unfit, start = find_images(options)[0], list[Skip](), 0, 0
    with rows_to(output, COLUMNS) as append:
        for places, images, bad in encode(model, pairs, options):
            lost += bad
            why, rows = dict(bad), list[Row]()
            found = dict(zip(places, classified(head, classes, images, calibration), strict=True))
            for place in range(start, start := start + len(places) + len(bad)):
                row = found[place] if place in found else {"note": why[pairs[place].pixels]}
                rows.append(EMPTY | row | {"path": printable(pairs[place].image)})
            unfit += sum(row["note"] == NOTHING for row in rows)
            append(rows)
    print(f"{output}: {len(pairs) - len(lost):,} images in {len(classes):,} classes")
    if unfit and calibration:
        print(f"{unfit:,} of them fit no class, with a precision of {calibration.precision:.1%}.")
    for path, reason in lost[:NAMED]:
        print(f"Not classified: {printable(path)}: {reason}")
    if len(lost) > NAMED:
        print(f"and {len(lost) - NAMED:,} more, which the file notes")
    return output


def classified(head: Head, classes: list[str], images: Encoded, calibration: Calibration | None) -> Iterator[Row]:
    """The rows of some images, but for their paths."""
    if not len(images.features):
        return
    logits = head.logits(images)
    best = logits.softmax(dim=1).topk(min(SHOWN, len(classes)), dim=1)
    for row, values, places in zip(logits, best.values.tolist(), best.indices.tolist(), strict=True):
        found: Row = {"class": classes[places[0]], "probability": values[0]}
        for number, (value, place) in enumerate(zip(values, places, strict=True), 1):
            found |= {f"class_{number}": classes[place], f"probability_{number}": value}
        if calibration is not None:
            similarity = row.max().item() / head.values["scale"]
            found["match"] = calibration.probability(similarity).item()
            if not calibration.fits(similarity):
                found |= {"class": None, "note": NOTHING}
        yield found
