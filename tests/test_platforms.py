"""What Windows and macOS do otherwise, as far as it can be shown on Linux.

Windows replaces and removes no file that anybody has open or mapped; on both, loader processes start afresh (spawn).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests import forked
from tests.conftest import TINY, write_pairs
from train_clip import cli, load
from train_clip.commands.convert import write_model
from train_clip.encoders.sources import load_image_encoder
from train_clip.files import write_text
from train_clip.models.clip import CLIP

TRAIN = "train --model_name tiny.yaml --folder pairs --batch_size 4 --accelerator cpu --output run --val_share 0.2"
VERBS = [
    f"{TRAIN} --epochs 2 --save_every 1 --ema 0.5 --num_workers 0",
    "train --resume run --epochs 3",
    "convert run run.safetensors",
    "convert run folder --to huggingface",
    "merge run.safetensors run/checkpoints/last.ckpt --folder pairs --output merged --json merged.json",
    "evaluate run --folder pairs --json scores.json --picture best.png",
    "data check pairs --json check.json",
    "data npz pairs",
    "data split pairs --output split",
    "data show pairs --output show.html",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pairs and a tiny model, in which one works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs", 12)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_file_is_replaced_that_is_open_or_mapped(here, monkeypatch):
    """In all that verbs write, a run's checkpoints after a resume among it: neither the old file nor the new one."""
    replaced, held = list[str](), list[tuple[str, str]]()
    replace = Path.replace

    def look(beside: Path, target: Path) -> Path:
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
        used = {str(link.readlink()) for link in links if link.is_symlink()}
        used |= {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        ours = (str(beside.absolute()), str(target.absolute()))
        held.extend((str(target), name) for name in used if name.startswith(ours))
        replaced.append(target.name)
        return replace(beside, target)

    monkeypatch.setattr(Path, "replace", look)
    for words in VERBS:
        cli.main(words.split())
    assert {"last.ckpt", "best.ckpt", "run.safetensors", "folder", "scores.json", "train.csv"} <= set(replaced)
    assert held == []
    with (here / "open").open("w"):
        write_text(here / "open", "seen by this test")
    assert held == [(str(here / "open"), str(here / "open"))]


@pytest.mark.parametrize("kind", ["safetensors", "huggingface", "encoder"])
def test_weights_do_not_change_with_their_file(kind, here, tiny_config):
    """Loaded, then the file is overwritten where it is, as by ``cp``: no weight of it is mapped."""
    if kind == "encoder":
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        transformers.ViTModel(transformers.ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained("model")
        model = load_image_encoder("hf:model").module
    else:
        write_model(CLIP(tiny_config), here / "model", kind)
        model = load("model").model
    (file,) = [here / "model"] if kind == "safetensors" else (here / "model").glob("*.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with file.open("r+b") as overwritten:
        overwritten.write(bytes(file.stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("times", [3, 1000])
def test_a_file_that_somebody_reads_is_replaced_later(times, tmp_path, monkeypatch):
    """Windows refuses until it is closed: tried again, for some seconds; then the old file stays, and it is said."""
    left, replace = [times], Path.replace

    def refuse(beside: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "The process cannot access the file", str(beside))
        return replace(beside, target)

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)
    if times < 100:
        write_text(tmp_path / "file", "new")
    else:
        with pytest.raises(PermissionError):
            write_text(tmp_path / "file", "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new" if times < 100 else "old"]


def test_an_old_checkpoint_that_somebody_reads_stays(here, monkeypatch):
    """It cannot be removed: training goes on, and a later save removes it."""
    refused, unlink = list[str](), Path.unlink

    def refuse(file: Path, missing_ok: bool = False) -> None:
        if file.name == "step-00000001.ckpt" and len(refused) < 2:
            refused.append(file.name)
            raise PermissionError(13, "The process cannot access the file", str(file))
        unlink(file, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    cli.main(f"{TRAIN} --max_steps 5 --save_every 1 --num_workers 0".split())
    steps = sorted(file.name for file in (here / "run" / "checkpoints").glob("step-*"))
    assert (len(refused), steps) == (2, ["step-00000004.ckpt", "step-00000005.ckpt"])


@pytest.mark.slow
def test_loader_processes_that_start_afresh(here):
    """What they are given can be sent to them, in each verb that has some."""
    spawn = "import multiprocessing, sys\nmultiprocessing.set_start_method('spawn')\nfrom train_clip import cli\n"
    for words in (f"{TRAIN} --epochs 1", "evaluate run --folder pairs", "data check pairs", "data npz pairs"):
        ended = forked.run(["-c", f"{spawn}cli.main(sys.argv[1:])", *words.split(), "--num_workers", "1"])
        assert ended.returncode == 0, ended.stderr
