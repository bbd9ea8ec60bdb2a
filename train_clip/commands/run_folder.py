"""The folder of a run: its options, its environment, its checkpoints, and which of them to resume from."""

import itertools
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from train_clip.checkpoints import own, sources
from train_clip.commands import launcher
from train_clip.errors import UserError
from train_clip.files import MAX_YAML, held, read_yaml, require_no_others, sweep, write_text
from train_clip.models.config import OWN_MODEL
from train_clip.training.same_run import require_same

AUTO = "auto"
OPENAI = "openai"
OPTIONS = "the options of a run, as it wrote them"
ABOUT = "run.yaml"  # the first file of a run, by which it is known
RUNS = Path("runs")  # where runs lie that were given no folder
VERSIONS_OF = ("train-clip", "torch", "lightning", "numpy", "pillow", "tokenizers", "ftfy", "jsonargparse")


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run resumes from."""

    run: Path | None  # the folder of the run that the checkpoint is of; None where it lies in none
    checkpoint: Path  # one that loads
    state: dict[str, Any]  # what it holds besides tensors of the model and the optimizer

    @property
    def step(self) -> int:
        """Optimizer steps that the run has done."""
        return int(self.state["global_step"])

    @property
    def arguments(self) -> dict[str, Any]:
        """What its module was made with."""
        return dict(self.state.get("hyper_parameters", {}))

    @property
    def config(self) -> dict[str, Any] | None:
        """The options of the run; None for a checkpoint that lies in none."""
        file = None if self.run is None else self.run / "config.yaml"
        return read_yaml(file, OPTIONS) if file and file.is_file() else None

    def require_same_start(self, asked: dict[str, Any], known: dict[str, Any] | None = None) -> None:
        """Refuse other weights than the run started from: its state holds the model, and they would be ignored.

        Of a checkpoint that lies in no run, only what is asked for is held against what it tells of itself, ``known``.
        """
        if (began := self.config) is None:
            began, asked = known or {}, {name: value for name, value in asked.items() if value is not None}
        kept = {name: began.get(name) for name in asked}
        weights, of_run = asked.get("pretrained"), kept.get("pretrained")
        is_one_file = weights and of_run and Path(weights).resolve() == Path(of_run).resolve()
        # Or OpenAI's weights, which a run keeps by their model's name.
        if is_one_file or (weights == OPENAI and of_run and sources.openai_name(of_run) is not None):
            kept |= {"pretrained": weights}
        require_same(
            asked,
            kept,
            f"{self.checkpoint}: the run started from other weights (found {{found}}). Leave out the option, or start "
            "a new run.",
        )


def run_to_resume(resume: str, output: Path | None) -> Path | None:
    """The folder of the run that ``--resume`` (and, with ``auto``, ``--output``) means; None for a lone checkpoint."""
    path = Path(resume) if resume != AUTO else output or _newest_run()
    if path.is_file():
        return path.parent.parent if path.parent.name == "checkpoints" else None
    run = path.parent if path.name == "checkpoints" else path
    if not _newest_first(run):
        raise UserError(
            f"--resume {resume}: there is no checkpoint in {run}/checkpoints/, and no such file. Expected a run that "
            "was saved at least once, a checkpoint, or auto; to start a new run leave out --resume."
        )
    return run


def options_of_run(verb: str, resume: str, output: str | None) -> dict[str, dict[str, Any]]:
    """The options that the run which ``--resume`` means began with, by their file; refuse to go on by another verb."""
    run = run_to_resume(resume, None if output is None else Path(output))
    if run is None or not (config := run / "config.yaml").is_file():
        return {}
    about, model = run / ABOUT, run / OWN_MODEL
    began = [verb]
    if about.is_file():
        with about.open(encoding="utf-8") as file:
            # Of its first start, which is every other's.
            began = re.findall("^verb: (.+)", file.read(MAX_YAML), re.MULTILINE) or began
    if began[0] != verb:
        raise UserError(
            f"{run}: a run of `train-clip {began[0]}`, not of `{verb}`. To resume it: train-clip {began[0]} --resume "
            f"{run}"
        )
    # The run's own copy of its model, wherever the run lies by now.
    own_model = {"model_name": str(model)} if model.is_file() else {}
    return {str(config): read_yaml(config, OPTIONS) | own_model}


def find_checkpoint(resume: str, output: Path | None) -> Resumption:
    """The newest checkpoint of a run that loads, or the one that is named; arguments as for ``run_to_resume``."""
    run = run_to_resume(resume, output)
    if run is None or Path(resume).is_file():
        return _read(run, Path(resume))
    for file in _newest_first(run):
        try:
            return _read(run, file)
        except UserError as error:
            rank_zero_only(print)(f"Skipped {error}")
    raise UserError(f"--resume {resume}: no checkpoint loads in {run}/checkpoints/, for the reasons above.")


@contextmanager
def claimed(output: Path | None, model_name: str, resumed: Resumption | None = None) -> Iterator[Path]:
    """The folder of a new run, ``runs/MODEL-DATE-TIME`` by default, or of the one that goes on; never another's.

    It is held against other runs until the block ends. If that has left nothing, no folder is left either.
    """
    run = resumed.run if resumed else None
    goes_on = run is not None and (output or run).resolve() == run.resolve()
    name = f"{model_name.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = run if run and goes_on else output or RUNS / name
    # Of several processes the first holds it.
    if not launcher.is_first():
        yield folder
        return
    is_given = goes_on or output is not None
    for number in itertools.count(2):
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=is_given)
            break
        except FileExistsError:
            if is_given:
                raise
            folder = RUNS / f"{name}-{number}"
    try:
        with held(folder):
            if not goes_on:
                _require_free(folder)
            yield folder
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


@rank_zero_only
def write_run_files(folder: Path, config: dict[str, Any], facts: dict[str, Any], model: dict[str, Any] | None) -> None:
    """Write ``config.yaml``, to be run again by ``--config``, and add to ``run.yaml`` what is good to know later.

    A ``model`` of no preset becomes ``model.yaml``.
    """
    sweep(folder)
    # Without what is not installed, as this package where it runs from its source.
    versions = {name: metadata.version(name) for name in VERSIONS_OF if any(metadata.Distribution.discover(name=name))}
    about = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": versions,
        "output": str(folder),
        **facts,
    }
    file = folder / ABOUT
    # One document a start.
    earlier = file.read_text(encoding="utf-8") + "---\n" if file.is_file() else ""
    write_text(file, earlier + yaml.safe_dump(about, sort_keys=False))
    # Nothing in it is shared: YAML would write an alias, which is not read.
    write_text(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
    if model is not None:
        write_text(folder / OWN_MODEL, yaml.safe_dump(model, sort_keys=False))


def _newest_run() -> Path:
    files = RUNS.glob("*/checkpoints/*.ckpt")
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UserError(
            f"--resume auto: no run below {RUNS}/ has a checkpoint. Give the run's folder with --output, or leave out "
            "--resume to start a new run."
        )
    return newest.parent.parent


def _newest_first(run: Path) -> list[Path]:
    """A run's checkpoints, each file by one of its names: last.ckpt, which is the newest, then by their times."""
    files = (run / "checkpoints").glob("*.ckpt")
    oldest_first = sorted(files, key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime_ns))
    # Of a file's names the newest wins, which stands last.
    return sorted({file.stat().st_ino: file for file in oldest_first}.values(), key=oldest_first.index, reverse=True)


def _read(run: Path | None, file: Path) -> Resumption:
    state = own.read_checkpoint(file)
    if own.RUNNING_MEAN in state:
        raise UserError(f"{file}: {own.NO_STATE}")
    if "EndOfStep" not in state.get("callbacks", {}) or "optimizer_states" not in state:
        raise UserError(f"{file}: holds no training state. Expected a checkpoint of `train-clip train`.")
    small = {name: value for name, value in state.items() if name not in ("state_dict", "optimizer_states")}
    return Resumption(run, file, small)


def _require_free(folder: Path) -> None:
    # A run that ended before its first checkpoint has nothing that would be lost.
    config = folder / "config.yaml"
    without = config.is_file() and "enable_checkpointing: false" in config.read_text(encoding="utf-8")
    if without or any((folder / "checkpoints").glob("*.ckpt")):
        raise UserError(
            f"{folder}: already holds a run, which is not overwritten. Give another --output, or --resume {folder} to "
            "continue it."
        )
    if not (folder / ABOUT).is_file():
        require_no_others(folder)
