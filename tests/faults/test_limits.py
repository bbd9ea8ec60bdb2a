"""Texts that never end: whatever holds one, it is refused, and no more of it is in memory than may be read.

Files of a gigabyte without a line break are sparse: a hole reads as NUL.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from train_clip import parser
from train_clip.commands.run_folder import options_of_run
from train_clip.data.pairs import read_caption_lines
from train_clip.data.table import scan_table
from train_clip.errors import BadSample, UserError
from train_clip.evaluation.zero_shot import class_name, read_list
from train_clip.files import MAX_CAPTIONS, MAX_PATH, MAX_ROW, MAX_YAML
from train_clip.models.config import read_config
from train_clip.options import SourceOptions

GIGABYTE = 2**30
HEADS = {
    ".csv": b'image,caption\na.jpg,"',
    ".tsv": b"image\tcaption\na.jpg\t",
    ".jsonl": b'{"image": "a.jpg", "caption": "',
}
ROW = "over 16,777,216 characters"


def refused(read: Callable[[], object]) -> str:
    """What is said of a text that is refused; in less than a tenth of its size."""
    tracemalloc.start()
    try:
        with pytest.raises((UserError, BadSample)) as caught:
            read()
        assert tracemalloc.get_traced_memory()[1] < GIGABYTE / 8
    finally:
        tracemalloc.stop()
    return str(caught.value)


def endless(path: Path, head: bytes = b"") -> Path:
    """A file of a gigabyte that begins so."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(GIGABYTE)
    return path


@pytest.mark.parametrize("suffix", HEADS)
@pytest.mark.parametrize("where", ["the first line", "a row"])
def test_a_table(tmp_path: Path, suffix: str, where: str) -> None:
    """A line of a gigabyte, of a table's columns or of a row: the table, the line and the most that is read."""
    table = endless(tmp_path / f"t{suffix}", HEADS[suffix] * (where == "a row"))
    line = 1 if where == "the first line" or suffix == ".jsonl" else 2
    assert f"{table}, line {line}: " in (said := refused(lambda: scan_table(table, SourceOptions())))
    assert ROW in said or "a cell has over 1,048,576 characters" in said


@pytest.mark.parametrize("text", ['"\n",', "a,", '"a ""b"" c",', "\n" * 9 + ",b,"])
def test_a_row_of_many_cells(tmp_path: Path, text: str) -> None:
    """Short cells, on one line or, in quotes, on many: the row is too long, and does not become several rows."""
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + text * (2 * MAX_ROW // len(text)))
    if text[0] == "\n":
        assert len(scan_table(table, SourceOptions()).faults) > 1e5  # so many rows
        return
    assert refused(lambda: scan_table(table, SourceOptions())) == (
        f"{table}, line 2: a row has {ROW}, as where a quote is not closed. Expected quotes around text that contains "
        'quotes, separators or line breaks, and quotes inside it doubled: "a ""red"" ball".'
    )


def test_rows_up_to_the_limit(tmp_path: Path) -> None:
    """One character less than is refused, and as many rows as there are: each is measured by itself."""
    columns = 'image,caption,"' + "c" * (MAX_CAPTIONS - 8) + '"'
    cells = ",".join(["b" * (MAX_CAPTIONS - 1)] * 15)
    table = tmp_path / "t.csv"
    header = f"image,caption,{','.join(f'n{number}' for number in range(15))}\n"
    row = f"a.jpg,a cat,{cells}\n"
    assert len(columns) < len(row) < MAX_ROW
    (tmp_path / "a.jpg").touch()
    table.write_text(header + row * 3)
    scan = scan_table(table, SourceOptions())
    assert not scan.faults
    assert scan.pairs[0].captions() == ["a cat"] * 3


@pytest.mark.parametrize("letter", ["a", "猫"])
def test_a_caption_is_as_long_in_a_table_as_in_a_file(tmp_path: Path, letter: str) -> None:
    """Bytes of UTF-8 count, in each format; and so they do of a path."""
    (tmp_path / "a.jpg").touch()
    size = len(letter.encode())
    most, over = letter * (MAX_CAPTIONS // size), letter * (MAX_CAPTIONS // size + 1)
    for text in (most, over):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        (tmp_path / "t.csv").write_text(f"image,caption\na.jpg,{text}\n", encoding="utf-8")
        (tmp_path / "t.tsv").write_text(f"image\tcaption\na.jpg\t{text}\n", encoding="utf-8")
        (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": ["a", text]}), encoding="utf-8")
        for table in ("t.csv", "t.tsv", "t.jsonl"):
            if text == most:
                assert scan_table(tmp_path / table, SourceOptions()).pairs[0].captions()[-1] == text
                continue
            try:
                (said,) = scan_table(tmp_path / table, SourceOptions()).faults
            except UserError as error:  # where csv itself has counted letters
                said = str(error)
            assert "1,048,576" in said
    assert "caption file over 1,048,576 bytes" in refused(lambda: read_caption_lines(str(tmp_path / "a.txt")))
    path = letter * (MAX_PATH // size + 1)
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": path, "caption": "a"}))
    (fault,) = scan_table(tmp_path / "t.jsonl", SourceOptions()).faults
    assert f"'image' has {len(path.encode()):,} bytes; expected the path of an image of at most 4,096" in fault


def test_files_of_captions_and_of_classes(tmp_path: Path) -> None:
    """A gigabyte in place of captions, class names, templates and an image's class."""
    over = "file over 1,048,576 bytes"
    assert over in refused(lambda: read_caption_lines(str(endless(tmp_path / "a.txt"))))
    assert over in refused(lambda: read_list(tmp_path / "a.txt"))
    endless(tmp_path / "b.cls")
    assert over in refused(lambda: class_name(tmp_path / "b.jpg"))


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML = {
    "aliases": (BOMB, "*a stands for other values: write them out"),
    "merged": ("a: &a {b: 1}\nc: {<<: *a}\n", "*a stands for other values"),
    "itself": ("a: &a [*a]\n", "*a stands for other values"),
    "long": ("a: " + "1" * MAX_YAML, "over 65,536 bytes"),
    "deep": ("[" * 20_000, "not YAML"),
    "a day that is none": ("a: 2001-99-99\n", "not YAML"),
    "a long number": ("a: " + "1" * 10_000, "not YAML"),
    "not UTF-8": ("a: [\udcff", "not YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A model, options, and those of a run that is resumed: refused within seconds, by name, with what is expected."""
    monkeypatch.chdir(tmp_path)
    text, found = YAML[name]
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/last.ckpt").touch()
    for place in ("model.yaml", "run/config.yaml"):
        Path(place).write_bytes(text.encode("utf-8", "surrogateescape"))
    started = time.monotonic()
    for read in (
        lambda: read_config("model.yaml"),
        lambda: parser.normalise(["--config", "model.yaml"], "train"),
        lambda: options_of_run("train", "run", None),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert found in (said := str(caught.value))
        assert said.startswith(("model.yaml: not YAML (", "run/config.yaml: not YAML ("))
        assert "). Expected " in said
    assert time.monotonic() - started < 30


def test_yaml_of_a_gigabyte(tmp_path: Path) -> None:
    """Refused after as much as may be read."""
    assert "over 65,536 bytes" in refused(lambda: read_config(str(endless(tmp_path / "model.yaml"))))


def test_a_run_that_was_started_a_thousand_times(tmp_path: Path) -> None:
    """Its ``run.yaml`` has a document for each start, and still tells by which verb."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "config.yaml").write_text("epochs: 1\n")
    (run / "run.yaml").write_text(
        "---\n".join(["command: train-clip finetune\nverb: finetune\n" + "x: y\n" * 99] * 1000)
    )
    assert options_of_run("finetune", str(run), None) == {str(run / "config.yaml"): {"epochs": 1}}
    with pytest.raises(UserError, match="a run of `train-clip finetune`, not of `train`"):
        options_of_run("train", str(run), None)
