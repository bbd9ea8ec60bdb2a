"""The folder of a run: what it was asked, what it ran on, and where its checkpoints, logs and plots go.

Where a run goes on: the newest of its checkpoints that loads.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from train_clip.errors import UserError
from train_clip.files import sweep, write_text

AUTO = "auto"
RUNS = Path("runs")  # where runs lie that were given no folder


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from.

    Args:
        run: the folder of the run that the checkpoint is of; None where it lies in none.
        checkpoint: one that loads.
        step: optimizer steps that it has done.
        state: what it holds besides tensors of the model and the optimizer.
        passed_over: newer ones and why they were not taken, a line each.
    """

    run: Path | None
    checkpoint: Path
    step: int
    state: Mapping[str, Any]
    passed_over: tuple[str, ...] = ()


def run_to_resume(resume: str, output: Path | None) -> Path | None:
    """The folder of the run that ``--resume`` means; None for a checkpoint that lies in no run.

    Args:
        resume: ``auto``, a run's folder, or a checkpoint.
        output: with ``auto``, the run's folder; otherwise not asked.

    Raises:
        UserError: there is no such run or file, or a run without checkpoints.
    """
    if resume == AUTO and output is None:
        return _newest_run()
    path = output if resume == AUTO and output is not None else Path(resume)
    path = path.parent if path.is_dir() and path.name == "checkpoints" else path
    if path.is_dir() or resume == AUTO:
        if not _newest_first(path):
            raise UserError(
                f"--resume {resume}: there is no checkpoint in {path}/checkpoints/. Expected a run that was saved at "
                "least once; to begin one leave --resume out."
            )
        return path
    if not path.is_file():
        raise UserError(f"--resume {resume}: there is no such file or folder. Expected a run, a checkpoint, or auto.")
    return path.parent.parent if path.parent.name == "checkpoints" else None


def require_verb(run: Path, verb: str) -> None:
    """Refuse to go on with a run by another verb than the one that began it.

    Args:
        run: its folder.
        verb: on the command line.

    Raises:
        UserError: another began it.
    """
    about = run / "run.yaml"
    starts = list(yaml.safe_load_all(about.read_text(encoding="utf-8"))) if about.is_file() else []
    began = starts[-1].get("verb", verb) if starts and isinstance(starts[-1], dict) else verb
    if began != verb:
        raise UserError(
            f"{run}: a run of `train-clip {began}`, not of `{verb}`. To go on: train-clip {began} --resume {run}"
        )


def find_checkpoint(resume: str, output: Path | None) -> Resumption:
    """The newest checkpoint of a run that loads, or the one that is named.

    Args:
        resume: as for ``run_to_resume``.
        output: as there.

    Raises:
        UserError: there is none, or none that loads.
    """
    run = run_to_resume(resume, output)
    if run is None or Path(resume).is_file():
        return _read(run, Path(resume))
    passed_over: list[str] = []
    for file in _newest_first(run):
        try:
            return _read(run, file, tuple(passed_over))
        except UserError as error:
            passed_over.append(str(error))
    reasons = "".join(f"\n  Passed over {reason}" for reason in passed_over)
    raise UserError(f"--resume {resume}: no checkpoint loads in {run}/checkpoints/.{reasons}")


def _newest_run() -> Path:
    runs = [folder for folder in RUNS.glob("*") if _newest_first(folder)]
    if not runs:
        raise UserError(
            f"--resume auto: no run below {RUNS}/ has a checkpoint. Give the run's folder by --output, or leave "
            "--resume out to begin a run."
        )
    return max(runs, key=lambda folder: _written(_newest_first(folder)[0]))


def _newest_first(run: Path) -> list[Path]:
    """A run's checkpoints, each file by one of its names: last.ckpt, which is the newest, then by their times."""
    files = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda file: (file.name == "last.ckpt", _written(file)))
    different: dict[int, Path] = {}
    for file in reversed(files):
        different.setdefault(file.stat().st_ino, file)
    return list(different.values())


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns


def _read(run: Path | None, file: Path, passed_over: tuple[str, ...] = ()) -> Resumption:
    from train_clip.checkpoints.own import NO_STATE, RUNNING_MEAN, read_checkpoint

    state = read_checkpoint(file)
    if RUNNING_MEAN in state:
        raise UserError(f"{file}: {NO_STATE}")
    if "EndOfStep" not in state.get("callbacks", {}) or "optimizer_states" not in state:
        raise UserError(
            f"{file}: holds no state of a run, only weights or something else. Expected a checkpoint of `train-clip "
            "train`."
        )
    small = {name: value for name, value in state.items() if name not in ("state_dict", "optimizer_states")}
    return Resumption(run, file, state["global_step"], small, passed_over)


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
