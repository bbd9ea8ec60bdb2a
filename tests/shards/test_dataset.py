"""Data sets of Hugging Face and Parquet files: the same pairs, pixels and captions as the folder that they hold."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

import train_clip
from tests.conftest import TINY
from train_clip.cli import main
from train_clip.data import crops
from train_clip.data.folder import scan_folder
from train_clip.data.scan import scan_source
from train_clip.errors import BadSample, UserError
from train_clip.options import SourceOptions
from train_clip.shards import dataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Nothing is downloaded, and nothing kept for another test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kept in (dataset.rows_of, dataset._images):
        kept.cache_clear()


@pytest.fixture
def rows(pair_folder) -> dict[str, list]:
    """The images and captions of twelve pairs, the captions as lists."""
    files = sorted(pair_folder.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text().split("\n")[:-1] for file in files]
    return {"image": [str(file) for file in files], "caption": captions}


def contents(rows: dict[str, list]) -> list[bytes]:
    return [Path(name).read_bytes() for name in rows["image"]]


@pytest.fixture(params=["folder", "splits", "parquet", "folder of parquet", "image feature"])
def spec(request, rows, tmp_path) -> str:
    """Everything that --dataset takes, of the same pairs."""
    there = tmp_path / "there"
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    if request.param == "folder":
        whole.save_to_disk(there)
        return str(there)
    if request.param == "splits":
        datasets.DatasetDict({"train": whole.select([0]), "val": whole}).save_to_disk(there)
        return f"{there}:val"
    there.mkdir()
    if request.param == "image feature":
        whole.to_parquet(there / "a.parquet")
        return f"{there}/a.parquet"
    for place in (0, 5):
        some = slice(place, 5 if place == 0 else None)
        table = {"image": contents(rows)[some], "caption": rows["caption"][some]}
        parquet.write_table(pyarrow.table(table), there / f"{place}.parquet", row_group_size=3)
    return str(there) if request.param == "folder of parquet" else f"{there}/*.parquet"


def scan(spec: str, **options):
    return scan_source(None, SourceOptions(dataset=spec, **options))


def test_pairs_are_those_of_the_folder(spec, pair_folder):
    found = scan(spec).require_pairs().pairs
    for own, other in zip(found, scan_folder(pair_folder).pairs, strict=True):
        assert own.captions() == other.captions()
        assert (crops.read_square(own.pixels, 16) == crops.read_square(other.pixels, 16)).all()


def test_training_is_that_of_the_folder(rows, pair_folder, tmp_path):
    """The same order and crops, by loader processes too: the same weights, bit for bit, but for which are held out."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    table = {"image": contents(rows), "caption": rows["caption"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    how = f"train --model_name {tmp_path}/tiny.yaml --batch_size 4 --epochs 1 --accelerator cpu --val_share 0"
    weights = []
    for name, words in {
        "one": ["--dataset", f"{tmp_path}/a.parquet", "--num_workers", "2"],
        "two": ["--folder", str(pair_folder)],
    }.items():
        main([*how.split(), *words, "--output", str(tmp_path / name)])
        weights.append(train_clip.load(tmp_path / name / "checkpoints" / "last.ckpt").model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_bad_rows_are_named_and_left_out(tmp_path, rows):
    table = {"image": [b"no image", None, contents(rows)[0], b""], "caption": ["one", "two", " ", None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    found = scan(f"{tmp_path}/a.parquet")
    assert len(found.pairs) == 2 and len(found.lone_images) == 2
    told = {}
    for pair in found.pairs:
        with pytest.raises(BadSample) as bad:
            crops.read_square(pair.pixels, 16)
        told[Path(bad.value.path).name] = bad.value.reason
    assert told == {
        "#image-000000000": "not an image that Pillow can read",
        "#image-000000001": "row without an image (NoneType)",
    }


@pytest.mark.parametrize(
    ("spec", "options", "told"),
    [
        ("nobody/nothing", {}, "cannot be opened"),
        ("{}/none.parquet", {}, "cannot be opened"),
        ("{}/a.parquet", {"image_column": "img"}, r"its columns are image, caption; expected 'img' \(--image_column\)"),
        ("{}/a.parquet", {"caption_column": "image"}, "row 0: its 'image' holds bytes; expected text"),
        ("{}/splits", {}, "has the splits one, two. Expected one of them"),
        ("{}/splits:three", {}, "has the splits one, two. Expected one of them"),
    ],
)
def test_what_is_wrong(spec, options, told, rows, tmp_path):
    table = {"image": contents(rows), "caption": rows["caption"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    some = datasets.Dataset.from_dict({"image": [b""], "caption": ["x"]})
    datasets.DatasetDict({"one": some, "two": some}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=told):
        scan(spec.format(tmp_path), **options).require_pairs()
