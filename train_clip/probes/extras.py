"""Optional libraries, imported when they are needed."""

from importlib import import_module
from typing import Any

from train_clip.errors import UserError, first_line

PACKAGES = {"sklearn": "scikit-learn"}  # of another name than their module


def extra(module: str) -> Any:
    """Import a module of an optional library, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        why, package = first_line(error), PACKAGES.get(name, name)
        raise UserError(f"{name}: needed here, and not available ({why}). Install it: pip install {package}") from None
