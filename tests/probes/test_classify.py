"""``train-clip classify``: rows against probabilities worked out from the embeddings, in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from tests import forked
from tests.conftest import said
from tests.probes.pictures import COLOURS, draw_classes, save_model
from train_clip import cli, load
from train_clip.checkpoints.found import fingerprint
from train_clip.probes import rows
from train_clip.probes.classify import COLUMNS

FORMATS = ("csv", "parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    save_model(folder / "model.ckpt"), draw_classes(folder / "data", number=5)
    (folder / "classes.txt").write_text("\n".join(COLOURS), encoding="utf-8")
    return folder


def classified(place: Path, output: Path, *words: object) -> list[dict]:
    """The rows of a command, read by the format's own library; empty cells are None."""
    fixed = (place / "model.ckpt", "--folder", place / "data", "--output", output)
    named = () if "--head" in words else ("--classes", place / "classes.txt")
    cli.main(["classify", *map(str, (*fixed, *named, *words))])
    return read(output)


def read(output: Path) -> list[dict]:
    if output.suffix == ".parquet":
        return parquet.read_table(output).to_pylist()
    with output.open(encoding="utf-8", newline="") as file:
        found = [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    numbers = [name for name, kind in COLUMNS.items() if kind is float]
    return [row | {name: row[name] and float(row[name]) for name in numbers} for row in found]


def test_every_image_has_the_row_that_its_embedding_gives(place, tmp_path):
    """Zero-shot: softmax of the scaled cosines, sorted; both formats hold the same, whatever the batches."""
    sizes = zip(FORMATS, (4, 64), strict=True)
    by_format = [classified(place, tmp_path / f"c.{kind}", "--batch_size", size) for kind, size in sizes]
    model = load(place / "model.ckpt")
    paths = sorted((place / "data").rglob("*.png"))
    names = list(COLOURS)
    images = model.encode(paths)
    texts = model.encode([f"a photo of a {name}." for name in names])
    logits = model.model.logit_scale.exp().item() * images @ texts.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for found in by_format:
        assert [row["path"] for row in found] == [str(path) for path in paths]
        for row, probabilities in zip(found, expected, strict=True):
            order = np.argsort(-probabilities)
            np.testing.assert_allclose([row[f"probability_{n}"] for n in (1, 2, 3)], probabilities[order], rtol=1e-5)
            assert row["class"] == row["class_1"] and row["probability"] == row["probability_1"]
            assert row["class_4"] is row["probability_5"] is row["match"] is None and not row["note"]
            assert abs(probabilities[names.index(row["class"])] - probabilities.max()) < 1e-6
    assert all(row["class_1"] == other["class_1"] for row, other in zip(*by_format, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_what_cannot_be_read_is_named_and_has_its_row(place, tmp_path, kind, capsys):
    """In the order of names among the others, with the reason; of a batch none of which can be read, too."""
    data = draw_classes(tmp_path / "data", number=4)
    bad = [data / "blue" / "b00.png", data / "green" / "g00.png", data / "green" / "g01.png"]
    for path in bad:
        path.write_bytes(b"no picture")
    words = ["--folder", str(data), "--batch_size", "2"]
    found = classified(place, tmp_path / f"c.{kind}", *words)
    assert [row["path"] for row in found] == [str(path) for path in sorted(data.rglob("*.png"))]
    assert {row["path"] for row in found if row["class"] is None} == {str(path) for path in bad}
    assert all(
        ("image" in row["note"]) == (row["class"] is None) for row in [r | {"note": r["note"] or ""} for r in found]
    )
    printed = capsys.readouterr().out
    assert "9 images in 3 classes" in printed and all(f"Not classified: {path}: " in printed for path in bad)


def test_a_saved_head_classifies(place, tmp_path):
    """A linear one: its own weights on the features, in NumPy."""
    head = tmp_path / "head.safetensors"
    words = ["probe", place / "model.ckpt", "--folder", place / "data", "--save", "linear", "--output", head]
    cli.main([*map(str, words)])
    found = classified(place, tmp_path / "c.parquet", "--head", head)
    from safetensors.numpy import load_file

    tensors = load_file(head)
    model = load(place / "model.ckpt")
    pixels = torch.stack([model.preprocess(row["path"]) for row in found])
    with torch.no_grad():
        tower = model.model.visual
        features = tower.ln_post(tower.transformer(tower.embed(pixels))[:, 0]).double().numpy()
    logits = features @ tensors["weight"].T + tensors["bias"]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose([row["probability"] for row in found], shares.max(axis=1), rtol=1e-4)
    names = sorted(COLOURS)
    assert [row["class"] for row in found] == [names[one] for one in shares.argmax(axis=1)]


def test_below_the_threshold_nothing_fits(place, tmp_path, capsys):
    """A calibration says how likely the best class matches, and below its threshold there is no class."""
    own = load(place / "model.ckpt")
    texts = own.encode([f"a photo of a {name}." for name in COLOURS])
    paths = sorted((place / "data").rglob("*.png"))
    best = (own.encode(paths) @ texts.T).max(axis=1)
    threshold = float(np.median(best)) + 1e-7
    values = {"threshold": threshold, "precision": 0.9, "slope": 30.0, "intercept": -2.0}
    written = {"version": 1, "kind": "classes", "fingerprint": fingerprint(own.model), "calibration": values}
    (tmp_path / "own.json").write_text(json.dumps(written))
    found = classified(place, tmp_path / "c.csv", "--calibration", tmp_path / "own.json")
    unfit = best < threshold
    assert [row["note"] == "nothing fits" for row in found] == unfit.tolist() and unfit.any() and not unfit.all()
    assert [row["class"] is None for row in found] == unfit.tolist() and all(row["class_1"] for row in found)
    np.testing.assert_allclose([row["match"] for row in found], 1 / (1 + np.exp(2 - 30 * best)), rtol=1e-4)
    assert f"{unfit.sum()} of them fit no class" in capsys.readouterr().out


def test_no_cell_is_a_formula(place, tmp_path, monkeypatch):
    """Names of files and classes that a spreadsheet would run begin with something else; the path still opens."""
    data = draw_classes(tmp_path / "=1+1", number=2)
    (data / "blue" / "b00.png").rename(data / "@b.png")
    (tmp_path / "evil.txt").write_text('=HYPERLINK("x")\n+1 cat\n')
    monkeypatch.chdir(tmp_path)
    fixed = [str(place / "model.ckpt"), "--folder", "=1+1", "--classes", "evil.txt"]
    for kind in FORMATS:
        cli.main(["classify", *fixed, "--output", f"c.{kind}"])
    cells = [cell for row in csv.reader((tmp_path / "c.csv").open(encoding="utf-8")) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert all(Path(row["path"]).is_file() for row in read(tmp_path / "c.csv"))
    assert {row["class"] for row in read(tmp_path / "c.parquet")} <= {'=HYPERLINK("x")', "+1 cat"}


def test_wrong_commands_are_refused_before_the_work(place, tmp_path, capsys):
    """No classes or two kinds, an unknown ending, a file that exists, a head that is none: nothing is written."""
    (tmp_path / "there.csv").touch()
    named = ["--classes", str(place / "classes.txt")]
    for words, message in (
        (["--output", "c.csv"], "Expected one of the two"),
        ([*named, "--head", "h.safetensors"], "Expected one of the two"),
        ([*named, "--output", str(tmp_path / "c.xlsx")], "a table ends in .csv, .parquet"),
        ([*named, "--output", str(tmp_path / "there.csv")], "already exists"),
        (["--head", str(tmp_path / "h.safetensors"), "--output", str(tmp_path / "c.csv")], "there is no such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["classify", str(place / "model.ckpt"), "--folder", str(place / "data"), *words])
        assert message in said(stop)
    assert {path.name for path in tmp_path.iterdir()} == {"there.csv"}


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_not_held(kind, tmp_path):
    """200,000 rows in batches of 1,000, in a process of its own: its memory grows by less than 100 MB."""
    script = f"""
import resource
from pathlib import Path
from train_clip.probes.classify import COLUMNS
from train_clip.probes.rows import rows_to

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row = {{name: "a text of a row" if kind is str else 0.5 for name, kind in COLUMNS.items()}}
with rows_to(Path("c.{kind}"), COLUMNS) as append:
    for batch in range(200):
        append([row] * 1000)
        if batch == 4:
            before = peak()
print(peak() - before)
"""
    ended = forked.run(["-c", script], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 100_000, "kB"
    assert (tmp_path / f"c.{kind}").stat().st_size > 0
    assert tuple(f".{one}" for one in FORMATS) == rows.FORMATS
