"""What other verbs have not taken from ``train_clip.options`` yet."""

from __future__ import annotations

from dataclasses import dataclass

from train_clip import options
from train_clip.checkpoints.found import Choices
from train_clip.data.table import Columns
from train_clip.errors import UserError
from train_clip.options import AugmentationOptions as AugmentationOptions


@dataclass(frozen=True)
class WeightOptions(options.WeightOptions):
    """What a file of weights may leave open, or is to be changed."""

    @property
    def choices(self) -> Choices:
        """What the user has chosen."""
        return Choices(self.model_name, self.activation, self.image_size, self.context_length)


@dataclass(frozen=True, kw_only=True)
class TableOptions(options.SourceOptions):
    """Where pairs come from."""

    @property
    def columns(self) -> Columns:
        """The table's columns."""
        return Columns(self.image_column, self.caption_column)


def require_least(**numbers: tuple[int, int]) -> None:
    """Refuse numbers that are too small."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f"--{name} {value}: expected {least} or above.")
