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

from train_clip.commands.resume import Resumption
from train_clip.errors import UserError
from train_clip.files import sweep, write_text

VERSIONS_OF = ("train-clip", "torch", "lightning", "numpy", "pillow", "tokenizers", "ftfy", "jsonargparse")


def choose_run_folder(output: Path | None, model_name: str, resumed: Resumption | None = None) -> Path:
    """The folder of a new run, or of the one that goes on.

    Args:
        output: what the user asked for; None for ``runs/MODEL-DATE-TIME``.
        model_name: for the default name.
        resumed: what the run goes on from, in its own folder where no other is asked for.

    Raises:
        UserError: the folder holds another run already, or is no folder.
    """
    if resumed is not None and resumed.run is not None and (output is None or _same(output, resumed.run)):
        return resumed.run
    if output is None:
        stem = Path(model_name).stem if model_name.endswith((".yaml", ".yml")) else model_name.replace("/", "-")
        return Path("runs") / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    # Other processes of the same run come here after the first has begun to write.
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first and output.exists():
        if not output.is_dir():
            raise UserError(f"{output}: is a file; expected a folder for the run. Give another --output.")
        if _holds_run(output):
            raise UserError(
                f"{output}: holds a run already, which stays as it is. Try --output {_next_free(output)}, or --resume "
                f"{output} to go on with it."
            )
    return output


@rank_zero_only
def write_run_files(
    folder: Path, config: dict[str, Any], facts: dict[str, Any], resumed: Resumption | None = None
) -> None:
    """Write ``config.yaml``, to be run again by ``--config``, and add to ``run.yaml`` what is good to know later.

    Args:
        folder: the run's.
        config: every option, resolved.
        facts: anything else, plain.
        resumed: what the run goes on from.
    """
    sweep(folder)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    about: dict[str, Any] = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: _version(name) for name in VERSIONS_OF},
    }
    if resumed is not None:
        about |= {"resumed_from": str(resumed.checkpoint), "after_steps": resumed.step}
    file = folder / "run.yaml"
    # One document a start.
    earlier = file.read_text(encoding="utf-8") + "---\n" if file.is_file() else ""
    write_text(file, earlier + yaml.safe_dump(about | {"output": str(folder)} | facts, sort_keys=False))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _holds_run(folder: Path) -> bool:
    """Whether a folder holds a run; one that ended before its first checkpoint has nothing that would be lost."""
    if any((folder / "checkpoints").glob("*.ckpt")):
        return True
    config = folder / "config.yaml"
    return config.is_file() and "enable_checkpointing: false" in config.read_text(encoding="utf-8")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _next_free(folder: Path) -> Path:
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")
