"""The transformers library and its hub: there or not, the cache first, without chatter, failures in one message."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from train_clip.errors import UserError, first_line


def check_folder(name: str) -> None:
    """Stop at a folder that is not there or holds no model."""
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise UserError(f"hf:{name}: no config.json in this folder. Give the one that save_pretrained wrote.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"hf:{name}: there is no such folder. Give a folder with config.json, or a hub name.")


def from_cache_first(read: Callable[..., Any], name: str, **arguments: Any) -> Any:
    """Read what is on this machine; ask the hub only for what is not: without a network it is asked for 20 s a file."""
    try:
        return read(name, local_files_only=True, trust_remote_code=False, **arguments)
    except OSError:
        if Path(name).is_dir():
            raise
        return read(name, trust_remote_code=False, **arguments)


def in_float32(transformers: Any) -> dict[str, torch.dtype]:
    """Name the argument for the dtype as this version does: ``torch_dtype`` before 4.56."""
    major, minor = map(int, transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": torch.float32}


@contextlib.contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turn what the library raises into one message that names the model and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        if Path(name).is_dir():
            message = f"{name}: cannot be loaded ({reason}). Copy or download the folder again."
        elif isinstance(error, OSError):
            message = (
                f"{name}: not in this machine's cache and not reachable ({reason}). Download it where there is a "
                f"network (`hf download {name} --local-dir FOLDER`) and give the folder: --{kind}_encoder hf:FOLDER."
            )
        else:
            message = f"{name}: cannot be loaded ({reason}). Take another model, or another version of transformers."
        raise UserError(f"hf:{message}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress over weights, the table of unused ones and the retries; downloads keep their bar."""
    chatter = importlib.import_module("transformers.utils.logging")
    hub = importlib.import_module("huggingface_hub.utils")
    verbosity, hub_verbosity = chatter.get_verbosity(), hub.logging.get_verbosity()
    bars, hub_bars = chatter.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    chatter.set_verbosity_error()
    hub.logging.set_verbosity_error()
    chatter.disable_progress_bar()
    if hub_bars:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        hub.logging.set_verbosity(hub_verbosity)
        if bars:
            chatter.enable_progress_bar()


def find_transformers() -> Any:
    """Import the library, or say how to install it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"hf: encoders of this source need the package transformers ({first_line(error)}). "
            "Install it: pip install 'train-clip[hf]'."
        ) from None
