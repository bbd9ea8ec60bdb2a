"""What a similarity means to one model, as ``calibrate`` has found: a file of JSON beside its weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_clip.errors import MissingFile, UserError, first_line

CALIBRATION = "calibration.json"
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What was fitted to a model, for cosine similarities of its embeddings."""

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


def find_calibration(source: str, of_model: str) -> Calibration | None:
    """Read what lies beside a checkpoint or other source of weights; None where there is nothing."""
    path = beside(source, CALIBRATION)
    return read_calibration(path, of_model) if path.exists() else None


def read_calibration(path: Path, of_model: str) -> Calibration:
    """Read a calibration; one that is damaged, or of another model by its ``found.fingerprint``, is refused."""
    if not path.is_file():
        raise MissingFile(f"{path}: there is no such file. Expected what `train-clip calibrate` wrote.")
    try:
        about: Any = json.loads(path.read_bytes())
        values = {name: about["calibration"][name] for name in Calibration.__annotations__}
        given: Any = {name: None if value is None else float(value) for name, value in values.items()}
        if about["version"] != VERSION or not all(math.isfinite(one or 0) for one in given.values()):
            raise ValueError(f"version {about['version']}, {given}")
        if about["fingerprint"] != of_model:
            raise UserError(f"{path}: of another model. Calibrate this one, or give another file, or remove this one.")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not what `train-clip calibrate` wrote, or damaged ({first_line(error)}). Calibrate again."
        ) from None
    return Calibration(**given)


def beside(source: str, ending: str) -> Path:
    """Where a file about weights lies: beside their file, in their folder, or here for a name on a hub."""
    place = Path(source)
    if place.is_dir():
        return place / ending
    return place.with_suffix(f".{ending}") if place.is_file() else Path(f"{place.name}.{ending}")
