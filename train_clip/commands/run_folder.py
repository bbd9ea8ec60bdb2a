"""The folder of a run: what it was asked, what it ran on, and where its checkpoints, logs and plots go."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from train_clip.errors import UserError
from train_clip.files import write_text

VERSIONS_OF = ("train-clip", "torch", "lightning", "numpy", "pillow", "tokenizers", "ftfy", "jsonargparse")


def choose_run_folder(output: Path | None, model_name: str) -> Path:
    """The folder of a new run.

    Args:
        output: what the user asked for; None for ``runs/MODEL-DATE-TIME``.
        model_name: for the default name.

    Raises:
        UserError: the folder holds a run already, or is no folder.
    """
    if output is None:
        stem = Path(model_name).stem if model_name.endswith((".yaml", ".yml")) else model_name.replace("/", "-")
        return Path("runs") / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    # Other processes of the same run come here after the first has begun to write.
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first and output.exists():
        if not output.is_dir():
            raise UserError(f"{output}: is a file; expected a folder for the run. Give another --output.")
        if any((output / name).exists() for name in ("config.yaml", "checkpoints")):
            raise UserError(f"{output}: holds a run already, which stays as it is. Try --output {_next_free(output)}.")
    return output


@rank_zero_only
def write_run_files(folder: Path, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write ``config.yaml``, to be run again by ``--config``, and ``run.yaml``, what is good to know later.

    Args:
        folder: the run's.
        config: every option, resolved.
        facts: anything else, plain.
    """
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    about = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: _version(name) for name in VERSIONS_OF},
    }
    write_text(folder / "run.yaml", yaml.safe_dump(about | facts, sort_keys=False))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _next_free(folder: Path) -> Path:
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")
