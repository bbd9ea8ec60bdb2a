"""Where a run goes on: the newest of its checkpoints that loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train_clip.errors import UserError

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
    from train_clip.checkpoints.own import NO_STATE, RUNNING_MEAN
    from train_clip.checkpoints.reading import read_checkpoint

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
