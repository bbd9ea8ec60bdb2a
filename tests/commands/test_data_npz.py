"""`data npz`: arrays against Pillow's resize of the images; begun again, interrupted, refused; what reads them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import forked
from tests.commands.test_train import model_file  # noqa: F401
from tests.conftest import write_pairs
from train_clip import cli
from train_clip.data.folder import scan_folder
from train_clip.data_tools.check import data_check
from train_clip.data_tools.npz import NpzOptions, data_npz
from train_clip.data_tools.report import CheckOptions
from train_clip.data_tools.show import ShowOptions, data_show
from train_clip.errors import UserError
from train_clip.options import PairBy
from train_clip.training.data_module import TextImageDataModule

SIZE = 16


def make(folder: Path, size: int = SIZE, workers: int = 0, pair_by: PairBy = "stem") -> tuple[int, int, int]:
    """How many arrays were written, were there, and were not to be had."""
    found = data_npz(folder, options=NpzOptions(size, workers, pair_by))
    return found["written"], found["there"], found["bad"]


def two_levels(folder: Path, number: int = 12) -> Path:
    """Pairs in img/ and text/."""
    write_pairs(folder, number)
    for place, suffix in (("img", "png"), ("text", "txt")):
        (folder / place).mkdir()
        for file in folder.glob(f"*.{suffix}"):
            file.rename(folder / place / file.name)
    return folder


def age(folder: Path) -> None:
    """Let all files be a minute old, so that what is made of them is newer on any clock."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - 60,) * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = two_levels(tmp_path / "pairs")
    age(made)
    return made


def batches(folder: Path, **how: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch as the data module reads it, training and then validation."""
    data = TextImageDataModule(folder, 4, image_size=SIZE, val_share=0.25, **how)  # type: ignore[arg-type]
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader())
    return [(batch.images, batch.texts) for loader in loaders for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_of_whole_pictures(folder: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each array against the image's shorter side resized by Pillow, the longer whole; and what is said of the disk."""
    turned = Image.new("RGB", (40, 20), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "img" / "000.png", exif=exif)
    age(folder)
    assert make(folder, workers=workers) == (12, 0, 0)
    for image in (folder / "img").iterdir():
        with Image.open(image) as picture:
            upright = picture.transpose(Image.Transpose.ROTATE_270) if image.stem == "000" else picture
            factor = SIZE / min(upright.size)
            sides = [SIZE if side == min(upright.size) else int(side * factor + 1e-9) for side in upright.size]
            expected = np.asarray(upright.resize((sides[0], sides[1]), Image.Resampling.BICUBIC))
        assert np.array_equal(np.load(folder / "npz" / f"{image.stem}.npz")["data"].transpose(1, 2, 0), expected)
    printed = capsys.readouterr().out
    images, arrays = (sum(file.stat().st_size for file in (folder / place).iterdir()) for place in ("img", "npz"))
    assert f"On disk: {arrays / 1e3:.0f} kB, compared with {images / 1e3:.0f} kB of images" in printed
    assert f"Next: train-clip train --folder {folder}," in printed


def test_an_epoch_is_the_same_with_arrays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training and validation batches before and after, although one image has no array; it is said.

    The same captions and windows; validation's pixels bit for bit, training's within two bicubics' difference.
    """
    caplog.set_level("INFO")
    before = batches(folder, seed=5)
    assert "npz" not in caplog.text
    make(folder)
    assert scan_folder(folder).pairs.num_cached == 12
    (folder / "npz" / "003.npz").unlink()
    for image in (folder / "img").iterdir():
        if image.stem != "003":
            image.write_bytes(b"not read any more")
    after = batches(folder, seed=5)
    assert "11 of 12 images are read from npz/ instead of files." in caplog.text
    assert len(before) == len(after) == 3
    for (images, texts), (other_images, other_texts) in zip(before, after, strict=True):
        assert (images.int() - other_images.int()).abs().max() <= 2
        assert torch.equal(texts, other_texts)
    assert torch.equal(before[-1][0], after[-1][0])


def test_what_is_there_is_passed_over(folder: Path) -> None:
    """A second run writes nothing; a newer image, a missing array and another size are made anew, and those alone."""
    assert make(folder) == (12, 0, 0)
    times = {file.name: file.stat().st_mtime_ns for file in (folder / "npz").iterdir()}
    assert make(folder) == (0, 12, 0)
    assert {file.name: file.stat().st_mtime_ns for file in (folder / "npz").iterdir()} == times
    Image.new("RGB", (30, 30), "red").save(folder / "img" / "001.png")
    os.utime(folder / "img" / "001.png", (time.time() + 60,) * 2)
    (folder / "npz" / "002.npz").unlink()
    assert make(folder) == (2, 10, 0)
    assert np.load(folder / "npz" / "001.npz")["data"].tolist()[0] == [[255] * SIZE] * SIZE
    age(folder / "img")
    assert make(folder, size=8) == (12, 0, 0)
    assert np.load(folder / "npz" / "002.npz")["data"].shape == (3, 8, 8)


def test_a_folder_given_from_within(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder as ".": made once, and known to be there."""
    monkeypatch.chdir(folder)
    assert make(Path()) == (12, 0, 0)
    assert make(Path()) == (0, 12, 0)


def test_images_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by reason and named; one that was readable once loses its array; training meets them as it did."""
    make(folder)
    for name, content in (("000", b"<html>"), ("001", b""), ("002", b"<html>")):
        (folder / "img" / f"{name}.png").write_bytes(content)
        os.utime(folder / "img" / f"{name}.png", (time.time() + 60,) * 2)
    capsys.readouterr()
    assert make(folder, workers=2) == (0, 9, 3)
    printed = capsys.readouterr().out
    assert "Bad: 3 images have no array." in printed
    assert f"  1 × empty file\n    {folder}/img/001.png\n" in printed
    assert f"  2 × not an image but an HTML page\n    {folder}/img/000.png\n    {folder}/img/002.png\n" in printed
    pairs = scan_folder(folder).pairs
    assert (len(pairs), pairs.num_cached) == (12, 9)
    for image in (folder / "img").iterdir():
        image.write_bytes(b"")
        os.utime(image, (time.time() + 60,) * 2)
    with pytest.raises(UserError, match="none of its 12 images can be read"):
        make(folder)


def test_one_stem_in_two_folders(tmp_path: Path) -> None:
    """Each keeps its folder below npz/, and pairs with its own image; two that cannot be told apart are refused."""
    for place, colour in (("u", "red"), ("v", "blue")):
        (tmp_path / place).mkdir()
        Image.new("RGB", (20, 20), colour).save(tmp_path / place / "1.png")
        (tmp_path / place / "1.txt").write_text(colour)
    assert make(tmp_path) == (2, 0, 0)
    for pair in scan_folder(tmp_path).require_pairs().pairs:
        with Image.open(pair.image) as picture:
            assert tuple(np.load(pair.cache)["data"][:, 0, 0]) == picture.getpixel((0, 0))
    shutil.copytree(tmp_path / "u", tmp_path / "img" / "u")
    with pytest.raises(UserError, match=r"img/u/1.png and u/1.png would both have npz/u/1.npz"):
        shutil.rmtree(tmp_path / "npz")
        make(tmp_path)


@pytest.mark.parametrize("content", ["floats", "other", "damaged"])
def test_what_was_not_made_here_is_not_replaced(folder: Path, content: str) -> None:
    """Normalised pixels, arrays of another name and files that cannot be read: refused, and left as they are."""
    array = folder / "npz" / "004.npz"
    array.parent.mkdir()
    if content == "damaged":
        array.write_bytes(b"PK")
    else:
        np.savez(array, **{"data" if content == "floats" else "image": np.zeros((3, SIZE, SIZE), np.float16)})
    before = array.read_bytes()
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"004\.npz: .*is not overwritten"):
            make(folder, workers=workers)
    assert array.read_bytes() == before


def test_no_room(folder: Path) -> None:
    """A file where npz/ should be: a sentence and exit code 1, from a worker too."""
    (folder / "npz").write_text("")
    for workers in "01":
        with pytest.raises(SystemExit) as stop:
            cli.main(["data", "npz", str(folder), "--image_size", "16", "--num_workers", workers])
        assert "000.npz" in str(stop.value.code)
        assert "Traceback" not in str(stop.value.code)


# Each array takes a while, so that no machine is so fast, nor this process so late, that none is left to be made.
SLOWLY = """
import time
from train_clip import cli
from train_clip.data import arrays

at_once = arrays.write_array
arrays.write_array = lambda *given: (at_once(*given), time.sleep(0.05))
cli.main()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_loses_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    """Ctrl-C and a kill in the middle: every array that is there is whole, and the next run makes the others alone."""
    folder = write_pairs(tmp_path / "pairs", 600, size=200)
    age(folder)
    words = ["data", "npz", str(folder), "--image_size", "100", "--num_workers", "2"]
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        process = forked.start(["-c", SLOWLY, *words], stdout=file, stderr=file)
    until = time.monotonic() + 60
    while len(list(folder.glob("npz/*.npz"))) < 20 and time.monotonic() < until:
        time.sleep(0.002)
    os.killpg(process.pid, stop)
    process.wait(timeout=60)
    made = list(folder.glob("npz/*.npz"))
    assert 20 <= len(made) < 600
    for array in made:
        assert np.load(array)["data"].shape[0] == 3
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in printed.read_text()
    (folder / "npz" / "left.npz.tmp-123").write_bytes(b"half")
    assert make(folder, size=100) == (600 - len(made), len(made), 0)
    assert len(list((folder / "npz").iterdir())) == 600


def test_nothing_to_do(tmp_path: Path, folder: Path) -> None:
    """No pairs, arrays alone, there is no such folder, a size that cannot be: each a sentence."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="0 pairs"):
        make(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no such folder"):
        make(tmp_path / "gone")
    with pytest.raises(UserError, match="image_size is 1; expected 2 or above"):
        make(folder, size=1)
    make(folder)
    shutil.rmtree(folder / "img")
    with pytest.raises(UserError, match=r"12 pairs have arrays .* and no images"):
        make(folder)


def test_check_and_show_read_the_arrays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data check` counts them, finds a bad one and a cache of another size; `data show` draws out of them."""
    make(folder)
    (folder / "npz" / "005.npz").write_bytes(b"")
    options = CheckOptions(image_size=SIZE, max_bad=0.5, num_workers=0, cache=False)
    report = data_check(folder, options=options)
    assert (report["pairs"], report["cached"]) == (12, 12)
    assert report["bad"] == {"empty file": [f"{folder}/npz/005.npz"]}
    assert report["sizes"] is not None
    assert (report["sizes"]["height"][0], report["sizes"]["height"][-1]) == (SIZE, SIZE)
    assert "12 × read from npz/ instead of the image" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"11 arrays do not have the model's 224 pixels.*data npz --image_size 224"):
        data_check(folder, options=CheckOptions(max_bad=0.5, num_workers=0, cache=False))
    shown = data_show(folder, options=ShowOptions(output=folder.parent / "page.html", image_size=SIZE))
    assert shown.read_text().count("<img") == 11 * 4


def as_the_fork_has_it(folder: Path, by_number: bool = False) -> Path:
    """The fork's layout: float16 arrays, already normalised, beside images."""
    two_levels(folder)
    (folder / "npz").mkdir()
    for number, image in enumerate(sorted((folder / "img").iterdir()), 1):
        values = np.random.default_rng(number).normal(size=(3, SIZE, SIZE)).astype(np.float16)
        text = folder / "text" / f"{image.stem}.txt"
        np.savez(folder / "npz" / (f"data{number}.npz" if by_number else f"{image.stem}.npz"), data=values)
        if by_number:
            image.rename(image.with_stem(f"image{number}"))
            text.rename(text.with_stem(f"text{number}"))
    return folder


@pytest.mark.parametrize("pair_by", ["stem", "number"])
def test_the_forks_files_train(tmp_path: Path, model_file: Path, pair_by: PairBy) -> None:  # noqa: F811
    """Two epochs by the command line on float16 arrays; batches hold the arrays' values; check and show take them."""
    folder = as_the_fork_has_it(tmp_path / "fork", pair_by == "number")
    values = {np.load(file)["data"].astype(np.float32).tobytes() for file in (folder / "npz").iterdir()}
    for images, _ in batches(folder, pair_by=pair_by):
        assert images.dtype == torch.float32
        assert all(image.numpy().tobytes() in values for image in images)
    words = [
        "--folder",
        str(folder),
        "--batch_size",
        "4",
        "--epochs",
        "2",
        "--accelerator",
        "cpu",
        "--pair_by",
        pair_by,
    ]
    cli.main(
        ["train", "--model_name", str(model_file), *words, "--val_share", "0.25", "--output", str(tmp_path / "run")]
    )
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    report = data_check(folder, options=CheckOptions(image_size=SIZE, num_workers=0, cache=False, pair_by=pair_by))
    assert (report["cached"], report["bad"], report["problems"]) == (12, {}, [])
    assert [listed["number"] for listed in report["mended"].values()] == [12]
    data_show(folder, options=ShowOptions(output=tmp_path / "page.html", image_size=SIZE, pair_by=pair_by))
    with pytest.raises(UserError, match=r"already normalized|by its number"):
        make(folder, pair_by=pair_by)


def test_both_kinds_in_a_folder(tmp_path: Path) -> None:
    """An image without an array among normalised ones: the run stops and names one of each; so does the check."""
    folder = as_the_fork_has_it(tmp_path / "fork")
    (folder / "npz" / "004.npz").unlink()
    with pytest.raises(UserError, match=rf"{folder}/img/004.png:? holds a picture"):
        batches(folder)
    with pytest.raises(
        UserError, match="11 of 12 images are arrays of already normalized pixels, the others are pictures"
    ):
        data_check(folder, options=CheckOptions(image_size=SIZE, num_workers=0, cache=False))


def test_scores_with_arrays_are_those_of_the_images(folder: Path, model_file: Path, capsys) -> None:  # noqa: F811
    """`evaluate` before and after: the same figures, also by class; the arrays are what is read."""
    output = folder.parent / "run"
    words = ["--folder", str(folder), "--batch_size", "4", "--max_steps", "2", "--accelerator", "cpu"]
    cli.main(["train", "--model_name", str(model_file), *words, "--output", str(output)])
    (folder.parent / "classes.txt").write_text("img\nother\n")
    figures = []
    for number in range(2):
        report = folder.parent / f"{number}.json"
        words = ["--folder", str(folder), "--device", "cpu", "--classes", str(folder.parent / "classes.txt")]
        cli.main(["evaluate", str(output / "checkpoints" / "last.ckpt"), *words, "--json", str(report)])
        figures.append(json.loads(report.read_text()))
        make(folder)
        if number == 0:
            (folder / "npz" / "007.npz").write_bytes(b"")
            cli.main(["evaluate", str(output / "checkpoints" / "last.ckpt"), *words])
            assert f"{folder}/npz/007.npz: empty file" in capsys.readouterr().out.replace("\n", "")
            (folder / "npz" / "007.npz").unlink()
            make(folder)
    assert figures[0] == figures[1]
