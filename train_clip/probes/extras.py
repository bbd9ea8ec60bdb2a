"""Optional libraries, imported when they are needed."""

from importlib import import_module
from typing import Any

from train_clip.errors import UserError, first_line


def extra(module: str, name: str) -> Any:
    """Import a module of one of this package's extras, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module.partition('.')[0]}: needed here and missing ({first_line(error)}). Install it: pip install "
            f"'train-clip[{name}]'."
        ) from None
