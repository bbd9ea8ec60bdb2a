"""`data split`: tables that a run takes, the same wherever and whatever the files are called."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands.test_train import metrics, model_file  # noqa: F401
from tests.conftest import write_pairs
from train_clip import cli
from train_clip.data.table import scan_table
from train_clip.data_tools.split import SplitOptions, data_split
from train_clip.errors import UserError

PARTS = ("train", "val", "test")


def split(folder: Path, output: Path, **options: object) -> dict[str, set[str]]:
    """Divide, and give the content of each part's images."""
    data_split(folder, options=SplitOptions(output=output, **options))  # type: ignore[arg-type]
    return {
        part: {Path(pair.image).read_bytes().hex() for pair in scan_table(output / f"{part}.csv").pairs}
        for part in PARTS
    }


def test_every_pair_once_with_all_its_captions(tmp_path: Path) -> None:
    """Forty pairs of two captions, a tenth and a fifth: the numbers, every pair in one table, its lines in order."""
    folder = write_pairs(tmp_path / "pairs", 40)
    parts = split(folder, tmp_path / "split", val_share=0.1, test_share=0.2)
    assert {part: len(images) for part, images in parts.items()} == {"train": 28, "val": 4, "test": 8}
    rows = [row for part in PARTS for row in csv.DictReader((tmp_path / "split" / f"{part}.csv").open(newline=""))]
    assert len(rows) == 80
    for index in range(40):
        captions = [row["caption"] for row in rows if row["image"] == f"../pairs/{index:03}.png"]
        assert captions == [f"picture {index}", f"the one numbered {index}"]


def test_neither_place_nor_names_matter_but_the_seed_does(tmp_path: Path) -> None:
    """The folder copied under other names, in other subfolders: each image on the same side; not with another seed."""
    folder = write_pairs(tmp_path / "pairs", 40)
    for index, image in enumerate(sorted(folder.glob("*.png"), reverse=True)):
        place = tmp_path / "copy" / str(index % 3)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place / f"other {index}.png")
        shutil.copy(image.with_suffix(".txt"), place / f"other {index}.txt")
    shares = {"val_share": 0.2, "test_share": 0.2}
    first = split(folder, tmp_path / "a", **shares)
    assert first == split(tmp_path / "copy", tmp_path / "elsewhere" / "b", **shares)
    assert first != split(folder, tmp_path / "c", seed=1, **shares)


def test_pairs_that_share_an_image_stay_on_one_side(tmp_path: Path) -> None:
    """Ten images, each under four names: no content in two tables, and the shares are kept to within a group."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for index in range(40):
        Image.fromarray(np.full((8, 8, 3), 20 * (index % 10), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}")
    for seed in range(5):
        parts = split(folder, tmp_path / f"split{seed}", val_share=0.25, test_share=0.25, seed=seed)
        assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 10
        assert (len(parts["val"]), len(parts["test"])) == (2, 2)


def test_a_cap_on_each_class(tmp_path: Path) -> None:
    """Two classes by folder, one by its .cls file: three pairs of each at most, the same ones at every share."""
    rng = np.random.default_rng(0)
    for index in range(24):
        place = tmp_path / "pairs" / ("cat" if index % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(f"number {index}")
        if index < 4:
            (place / f"{index}.cls").write_text("bird")
    parts = split(tmp_path / "pairs", tmp_path / "a", max_per_class=3, val_share=0.0, test_share=0.0)
    assert len(parts["train"]) == 9
    names = [Path(pair.image) for pair in scan_table(tmp_path / "a" / "train.csv").pairs]
    classes = ["bird" if int(name.stem) < 4 else name.parent.name for name in names]
    assert sorted(classes) == ["bird"] * 3 + ["cat"] * 3 + ["dog"] * 3
    other = split(tmp_path / "pairs", tmp_path / "b", max_per_class=3, val_share=0.2, test_share=0.2)
    assert set.union(*other.values()) == parts["train"]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caption of blanks: named, and in no table."""
    folder = write_pairs(tmp_path / "pairs", 6)
    (folder / "002.txt").write_text(" \n")
    assert sum(map(len, split(folder, tmp_path / "split").values())) == 5
    assert f"Left out:\n  1 × caption is empty\n    {folder}/002.txt\n" in capsys.readouterr().out


def test_a_table_divides_like_its_folder(tmp_path: Path) -> None:
    """The tables of a table, against those of the folder."""
    folder = write_pairs(tmp_path / "pairs", 30)
    whole = split(folder, tmp_path / "whole", val_share=0.0, test_share=0.0)
    assert len(whole["train"]) == 30
    first = split(folder, tmp_path / "a", val_share=0.2)
    data_split(options=SplitOptions(pairs=tmp_path / "whole" / "train.csv", output=tmp_path / "b", val_share=0.2))
    for part in PARTS:
        assert (tmp_path / "a" / f"{part}.csv").read_text() == (tmp_path / "b" / f"{part}.csv").read_text()
    assert first["val"]


def test_the_tables_train_and_evaluate(tmp_path: Path, model_file: Path, capsys) -> None:  # noqa: F811
    """Split, train on train.csv with val.csv, evaluate on test.csv: by the commands that each prints for the next."""
    folder = write_pairs(tmp_path / "pairs", 30)
    output = tmp_path / "split"
    cli.main(["data", "split", str(folder), "--output", str(output), "--val_share", "0.2", "--test_share", "0.2"])
    (proposed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: train-clip train")]
    words = [*proposed.split()[2:], "--model_name", str(model_file), "--batch_size", "4", "--epochs", "1"]
    cli.main([*words, "--accelerator", "cpu", "--log_every_n_steps", "1", "--output", str(tmp_path / "run")])
    (proposed,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: train-clip evaluate")
    ]
    assert proposed.split()[4:] == ["--pairs", str(output / "val.csv")]
    cli.main(proposed.split()[2:])
    assert "6 images, 12 captions" in capsys.readouterr().out
    cli.main(["evaluate", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), "--pairs", str(output / "test.csv")])
    assert "6 images, 12 captions" in capsys.readouterr().out


def test_a_table_of_the_whole_folder_trains_as_the_folder(tmp_path: Path, model_file: Path) -> None:  # noqa: F811
    """The same losses, step by step, from the folder and from a table beside the images."""
    folder = write_pairs(tmp_path / "pairs", 12)
    data_split(folder, options=SplitOptions(output=tmp_path / "split", val_share=0.0, test_share=0.0))
    shutil.copy(tmp_path / "split" / "train.csv", folder / "pairs.csv")
    text = (folder / "pairs.csv").read_text().replace("../pairs/", "").replace("image,caption", "file,title")
    (folder / "pairs.csv").write_text(text)
    losses = []
    for number, words in enumerate(
        (["--folder", str(folder)], ["--pairs", str(folder / "pairs.csv"), "--image_column", "file"])
    ):
        run = tmp_path / f"run{number}"
        columns = ["--caption_column", "title"] if number else []
        words += [
            *columns,
            "--model_name",
            str(model_file),
            "--val_share",
            "0.25",
            "--batch_size",
            "4",
            "--epochs",
            "2",
        ]
        cli.main(["train", *words, "--accelerator", "cpu", "--log_every_n_steps", "1", "--output", str(run)])
        losses.append([(row["train/loss"], row["val/loss"]) for row in metrics(run)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 0.5, "test_share": 0.5}, "expected their sum below 1"),
        ({"val_share": -0.1}, "val_share is -0.1"),
        ({"max_per_class": 0}, "max_per_class is 0; expected 1 or above"),
    ],
)
def test_what_cannot_work(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Shares and caps out of range: refused, nothing written."""
    with pytest.raises(UserError, match=message):
        split(write_pairs(tmp_path / "pairs", 4), tmp_path / "split", **options)
    assert not (tmp_path / "split").exists()


def test_a_name_that_no_table_can_hold(tmp_path: Path) -> None:
    """Bytes that are not UTF-8: refused by name before anything is written."""
    folder = write_pairs(tmp_path / "pairs", 4)
    for suffix in (".png", ".txt"):
        (folder / f"000{suffix}").rename(folder / f"b\udce4r{suffix}")
    with pytest.raises(UserError) as caught:
        split(folder, tmp_path / "split")
    assert str(caught.value) == f"{folder}/b\\xe4r.png: its name is not UTF-8, so no table can hold it. Rename it."
    assert not (tmp_path / "split").exists()


def test_tables_are_not_overwritten(tmp_path: Path) -> None:
    """A second split into one folder is refused and leaves the first as it is."""
    folder = write_pairs(tmp_path / "pairs", 8)
    split(folder, tmp_path / "split")
    before = (tmp_path / "split" / "train.csv").read_text()
    with pytest.raises(UserError, match="already exists, and is not overwritten"):
        split(folder, tmp_path / "split", seed=1)
    assert (tmp_path / "split" / "train.csv").read_text() == before


def test_tables_are_not_written_among_other_files(tmp_path: Path) -> None:
    """The data folder itself is refused, and left as it is; a folder that looks empty is not."""
    folder = write_pairs(tmp_path / "pairs", 8)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"pairs: holds '\d+\.\w+' already, and the output files would be mixed"):
        split(folder, folder)
    assert sorted(folder.iterdir()) == before
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / ".DS_Store").touch()
    split(folder, tmp_path / "split")


# Groups


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """A table of 60 pairs of 12 patients, five in each folder, with repeated captions and similar images."""
    rng, folder = np.random.default_rng(0), tmp_path / "pairs"
    rows = ["image,caption,patient"]
    for number in range(60):
        name = f"{number // 5}/{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if number % 10 != 9:  # else the one before, a little brighter: lossless, so that its hash stays
            small = Image.fromarray(rng.integers(0, 200, (6, 6, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))
        else:
            pixels = pixels + np.uint8(3)
        Image.fromarray(pixels).save(folder / name)
        rows.append(f"{name},finding {number % 25},p{number * 7 % 12}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder / "table.csv"


def divided(table: Path, output: Path, **options: object) -> dict[str, set[int]]:
    data_split(options=SplitOptions(pairs=table, output=output, val_share=0.2, test_share=0.2, **options))  # type: ignore[arg-type]
    return {part: {int(Path(pair.image).stem) for pair in scan_table(output / f"{part}.csv").pairs} for part in PARTS}


@pytest.mark.parametrize(("group", "of"), [("patient", lambda n: n * 7 % 12), ("folder", lambda n: n // 5)])
def test_no_group_is_on_two_sides(patients, tmp_path, group, of) -> None:
    parts = divided(patients, tmp_path / "split", group=group)
    assert sorted(number for part in parts.values() for number in part) == list(range(60))
    assert {part: len(numbers) for part, numbers in parts.items()} == {"train": 40, "val": 10, "test": 10}
    groups = [{of(number) for number in part} for part in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12


def test_what_is_on_both_sides_is_named_or_kept_together(patients, tmp_path, capsys) -> None:
    """Captions and similar images, against the numbers that were written."""
    parts = divided(patients, tmp_path / "named", similar_images="named")
    held_out = parts["val"] | parts["test"]
    captions = {number for number in held_out if number % 25 in {other % 25 for other in parts["train"]}}
    similar = {n for n in held_out if (n ^ 1 if n % 10 in (8, 9) else -1) in parts["train"]}
    said = capsys.readouterr().out
    assert captions and f"{len(captions)} of 24 held-out pairs share a caption with training" in said
    assert similar and f"{len(similar)} of 24 held-out pairs share a similar image with training" in said
    parts = divided(patients, tmp_path / "kept", similar_images="together", equal_captions="together")
    assert "share" not in capsys.readouterr().out
    for part in parts.values():
        assert part == {n for n in range(60) if any((n - m) % 25 == 0 for m in part)}
        assert all(n ^ 1 in part for n in part if n % 10 in (8, 9))


@pytest.mark.parametrize(
    ("group", "source", "told"),
    [
        ("product", "table", "expected one 'product'. Name the columns with --image_column and --group"),
        ("patient", "folder", "is a column of a table"),
    ],
)
def test_groups_that_are_not_there(group, source, told, patients, tmp_path) -> None:
    with pytest.raises(UserError, match=told):
        if source == "table":
            data_split(options=SplitOptions(pairs=patients, output=tmp_path / "out", group=group))
        else:
            data_split(write_pairs(tmp_path / "more", 3), options=SplitOptions(output=tmp_path / "out", group=group))


def test_a_row_without_a_group_is_named(patients, tmp_path) -> None:
    lines = patients.read_text().split("\n")
    lines[2] = lines[2].rpartition(",")[0] + ","
    patients.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"0/1\.png: has no group in the column 'patient'"):
        data_split(options=SplitOptions(pairs=patients, output=tmp_path / "out", group="patient"))
