"""``train-clip merge``: weights between two checkpoints, and their figures side by side."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from tests.conftest import TINY, said, write_pairs
from train_clip import CLIPWrapper, cli, estimates
from train_clip.checkpoints.own import read_checkpoint
from train_clip.commands import merge
from train_clip.commands.merge import interpolate, require_one_model
from train_clip.errors import UserError

SHORT = "--folder data --batch_size 4 --accelerator cpu --val_share 0 --epochs 1 --num_workers 0".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, what fine-tuning made of it, and another model."""
    folder = tmp_path_factory.mktemp("merge")
    write_pairs(folder / "data", 12)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "other.yaml").write_text(yaml.safe_dump(TINY | {"embed_dim": 8}))
    (folder / "names.txt").write_text("picture 0\npicture 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["train", "--model_name", "tiny.yaml", *SHORT, "--output", "start"])
        cli.main(["train", "--model_name", "other.yaml", *SHORT, "--output", "other"])
        start = "start/checkpoints/last.ckpt"
        cli.main(["finetune", "--pretrained", start, *SHORT, "--learning_rate", "1e-2", "--output", "tuned"])
    return folder


def last(run: str) -> str:
    return f"{run}/checkpoints/last.ckpt"


def test_weights_lie_on_the_line(made, tmp_path, monkeypatch):
    """Three files in one go, each tensor against the formula in float64; Lightning loads them too."""
    monkeypatch.chdir(made)
    cli.main(["merge", last("start"), last("tuned"), "--weight", "[0, 0.25, 1]", "--output", str(tmp_path)])
    start, tuned = (read_checkpoint(Path(last(run)))["state_dict"] for run in ("start", "tuned"))
    for weight in (0.0, 0.25, 1.0):
        merged = CLIPWrapper.load_from_checkpoint(tmp_path / f"merged-{weight:g}.ckpt").state_dict()
        for name, value in merged.items():
            expected = (1 - weight) * start[name].double() + weight * tuned[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-7)
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)


def test_figures_side_by_side(made, tmp_path, monkeypatch, capsys):
    """Both ends and what lies between, on one's own pairs and on others, as ``evaluate`` scores each."""
    monkeypatch.chdir(made)
    words = ["--folder", "data", "--other_folder", "data", "--json", str(tmp_path / "scores.json")]
    cli.main(["merge", last("start"), last("tuned"), "--output", str(tmp_path), *words])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found) == ["0", "0.5", "1"]
    for weight, file in (("0", last("start")), ("0.5", str(tmp_path / "merged-0.5.ckpt")), ("1", last("tuned"))):
        cli.main(["evaluate", file, "--folder", "data", "--json", str(tmp_path / "one.json")])
        assert found[weight]["data"] == json.loads((tmp_path / "one.json").read_text())
    assert "R@1 i→t" in capsys.readouterr().out


def test_the_models_that_are_to_come(made, tmp_path, monkeypatch, capsys):
    """30 s for each of the two that there are, so 60 for two more; a disk for one of two: refused, none is written."""
    monkeypatch.chdir(made)
    clock = iter((100.0, 160.0))
    monkeypatch.setattr(merge, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    words = ["merge", last("start"), last("tuned"), "--weight", "[0, 0.25, 0.5]", "--output", str(tmp_path)]
    cli.main(words)
    monkeypatch.undo()
    monkeypatch.chdir(made)
    assert "The merged models are scored likewise: about 60 s, done at about" in capsys.readouterr().out
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda _: SimpleNamespace(total=1e12, free=1e6))
    with pytest.raises(SystemExit, match=f"{tmp_path}/new: 1 MB of disk space are free. Expected room for"):
        cli.main([*words[:-1], str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "words", "expected"),
    [
        (("start", "other"), "", "another model: its embed_dim is 16, expected 8"),
        (("start", "tuned"), "--weight 1.5", "expected a number from 0, the first checkpoint, to 1"),
        (("start", "tuned"), "--weight [0.5,1.5]", "expected a number from 0, the first checkpoint, to 1"),
        (
            ("start", "tuned"),
            "--weight []",
            r'--weight \[\]: expected a number .*, or several .*: --weight "\[0\.25, 0\.5\]"',
        ),
        (
            ("start", "tuned"),
            "--weight [0.5,0.5000001]",
            r"\[0\.5, 0\.5000001\]: .*several that differ within six digits",
        ),
        (("start", "tuned"), "--weight 0.25 0.5", r'one word: --weight "\[0\.25, 0\.5\]"'),
        (("start", "tuned"), "--weight 0.25,0.5", r'one word: --weight "\[0\.25, 0\.5\]"'),
        (("start", "tuned"), "--weight=0.25 0.5", r'one word: --weight "\[0\.25, 0\.5\]"'),
        (("start", "tuned"), "--folder ../nothere", "nothere"),
        (("start", "tuned"), "--other_folder data --other_classes names.txt", "class"),
        (("start", "tuned"), "--other_classes names.txt", "need --other_folder"),
        (("start", "tuned"), "--other_templates names.txt", "need --other_folder"),
        (("start", "tuned"), "--folder data --device nowhere", "not available here"),
        (("start", "tuned"), "--folder data --json data", "is not a regular file"),
        (("start", "nothing"), "", "No such file"),
    ],
)
def test_what_cannot_be_merged(made, tmp_path, monkeypatch, files, words, expected):
    """Another model, a weight beyond the ends, a file that is not there; nothing is written."""
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit) as stop:
        cli.main(["merge", *map(last, files), *words.split(), "--output", str(tmp_path)])
    assert re.search(expected, said(stop))
    assert not list(tmp_path.iterdir())


def test_merged_models_are_among_themselves(made, tmp_path, monkeypatch):
    """In a folder of their own, to which a later command adds; not in the current folder, in the data's or in a run."""
    monkeypatch.chdir(made)
    before = sorted(Path().iterdir())
    try:
        for weight in ("0.5", "0.75"):
            cli.main(["merge", last("start"), last("tuned"), "--weight", weight])
        assert sorted(file.name for file in Path("merged").iterdir()) == ["merged-0.5.ckpt", "merged-0.75.ckpt"]
    finally:
        shutil.rmtree("merged", ignore_errors=True)
    for other in (".", "data", "tuned", "tuned/checkpoints"):
        with pytest.raises(SystemExit, match="already, and the output files would be mixed"):
            cli.main(["merge", last("start"), last("tuned"), "--output", other])
    assert sorted(Path().iterdir()) == before


def test_a_file_that_is_there_stays(made, tmp_path, monkeypatch):
    """Its name is said."""
    monkeypatch.chdir(made)
    (tmp_path / "merged-0.5.ckpt").write_text("mine")
    with pytest.raises(SystemExit, match=r"merged-0\.5\.ckpt: already exists"):
        cli.main(["merge", last("start"), last("tuned"), "--output", str(tmp_path)])
    assert (tmp_path / "merged-0.5.ckpt").read_text() == "mine"


def test_whole_numbers_are_the_tuned_models():
    """Counts of batches lie on no line; half precision is mixed in float32."""
    start = {"count": torch.tensor(3), "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    tuned = {"count": torch.tensor(8), "half": torch.tensor([2.0, 4.0], dtype=torch.bfloat16)}
    merged = interpolate(start, tuned, 0.5)
    assert merged["count"] == 8
    assert merged["half"].dtype == torch.bfloat16
    assert merged["half"].tolist() == [1.5, 3.0]
    with pytest.raises(UserError, match=r"two models \(found b \(1,\), was None; a None, was \(1,\)\)|a None"):
        require_one_model({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    with pytest.raises(UserError, match=r"two models \(found a \(2,\), was \(1,\)\)"):
        require_one_model({"a": torch.zeros(1)}, {"a": torch.zeros(2)})
