"""Optional libraries, imported where they are used."""

from importlib import import_module
from typing import Any

from train_clip.errors import UserError, first_line

PACKAGES = {"sklearn": "scikit-learn", "imagehash": "ImageHash"}  # of another name than their module


def optional(module: str, what: str, instead: str = "") -> Any:
    """Import a module of a library; where it is not available, say ``what`` needs it, and what would do ``instead``."""
    try:
        return import_module(module)
    except ImportError as error:
        package = PACKAGES.get(name := module.partition(".")[0], name)
        raise UserError(
            f"{what} needs {package}, which is not available ({first_line(error)}). Install it: pip install {package}"
            f"{instead and f', or {instead}'}."
        ) from None
