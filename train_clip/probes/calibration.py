"""What a similarity means to one model, as `evaluate --calibrate` has found: a file of JSON beside its weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.sources import HUB
from train_clip.errors import MissingFile, UserError, first_line
from train_clip.models.clip import DualEncoder

VERSION = 1
CAPTIONS, CLASSES = "captions", "classes"  # kinds: with what the similarities of images are
NOTHING = "nothing fits"  # where all similarities are below the threshold


@dataclass(frozen=True)
class Calibration:
    """What was fitted to a model, for cosine similarities of an image with captions, or with classes."""

    threshold: float | None  # the lowest that keeps the wanted precision; None where none does
    precision: float  # that was wanted
    slope: float
    intercept: float

    def probability(self, similarities: Any) -> np.ndarray:
        """That pairs of these similarities match, float64 in their shape: Platt's logistic function."""
        return np.asarray(1 / (1 + np.exp(-(self.slope * np.asarray(similarities, np.float64) + self.intercept))))

    def fits(self, similarities: Any) -> np.ndarray:
        """Whether pairs match, with the wanted precision: bool, in their shape; all where none can be kept."""
        return np.asarray(similarities, np.float64) >= (-math.inf if self.threshold is None else self.threshold)


def find_calibration(model: DualEncoder, source: str, kind: str, given: Path | None = None) -> Calibration | None:
    """Read the calibration that is given, or one beside the model's source, if there is any.

    One of another kind is refused, and of another model, too; that which nobody has given is left out then.
    """
    path = given or place_of(source, kind)
    if given is None and not path.exists():
        return None
    if not path.is_file():
        raise MissingFile(f"{path}: there is no such file. Expected what `train-clip evaluate --calibrate` wrote.")
    try:
        about: Any = json.loads(path.read_bytes())
        values = {name: about["calibration"][name] for name in Calibration.__annotations__}
        found: Any = {name: None if value is None else float(value) for name, value in values.items()}
        if about["version"] != VERSION or not all(math.isfinite(one or 0) for one in found.values()):
            raise ValueError(f"version {about['version']}, {found}")
        of, of_kind = about["fingerprint"], about["kind"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not what `train-clip evaluate --calibrate` wrote, or damaged ({first_line(error)}). Calibrate "
            "again, or remove it."
        ) from None
    if of_kind != kind:
        raise UserError(f"{path}: of similarities with {of_kind}; expected {kind}. Give another file.")
    if of == fingerprint(model):
        return Calibration(**found)
    if given is None:
        print(f"{path}: of another model, or of other options for it, and not used. To have one, calibrate this model.")
        return None
    raise UserError(f"{path}: of another model. Calibrate this one, or give another file.")


def place_of(source: str, kind: str) -> Path:
    """Where a calibration lies that nobody gives."""
    return beside(source, f"calibration.{kind}.json")


def beside(source: str, ending: str) -> Path:
    """Where a file about weights lies: beside their file, in their folder, or here for a name on a hub."""
    place = Path(source.removeprefix(HUB))
    if place.is_dir():
        return place / ending
    return place.with_suffix(f".{ending}") if place.is_file() else Path(f"{place.name}.{ending}")
