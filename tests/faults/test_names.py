"""Names, captions and values that are hostile, through every command: nothing but text is printed, and no work is lost.

Each is a valid file name on Linux, and most are in captions, in a table, in tensors' names and in a file's values too.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests import forked
from tests.conftest import TINY
from tests.test_printing import codes
from train_clip.data.table import scan_table
from train_clip.options import SourceOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")

EVIL = [
    "\x1b[2J",
    "\x9b31m",
    "\u202egnp",
    "\u2066a",
    "\nDone after",
    "\rfoo",
    "\tx",
    "\x07",
    "\x85",
    "\u2028",
    "\udcff",
]
FORMULAS = ["=cmd|' !A0", "+1", "-1", "@x", "\t=1"]
CAPTION = "left \x1b[31m of a \x9b2J \u202e cat"


def write_image(path: Path, number: int) -> None:
    Image.new("RGB", (20, 20), (number, 0, 0)).save(path.with_name("image.png"))
    path.with_name("image.png").rename(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of pairs of hostile names, some bad, some alone; one with two files of one stem; a model of its own."""
    place = tmp_path_factory.mktemp("names")
    good, twice = place / "data", place / "twice"
    for folder in (good / "x[", twice):
        folder.mkdir(parents=True)
    for number, evil in enumerate([*EVIL, *FORMULAS, "x[/b]"]):
        write_image(good / f"{evil}.png", number)
        (good / f"{evil}.txt").write_text(f"{CAPTION}\n{FORMULAS[0]}\n")
        if "/" not in evil:
            write_image(good / f"alone{evil}.png", number)
            (good / f"alone too{evil}.txt").write_text("a cat")
            (good / f"bad{evil}.png").write_bytes(b"")
            (good / f"bad{evil}.txt").write_text("a cat")
            (good / f"odd.{evil}").write_bytes(b"")
            for suffix in ("png", "jpg", "txt"):
                (twice / f"{evil}.{suffix}").write_bytes(b"")
    (place / "model.yaml").write_text(yaml.safe_dump(TINY))
    run = f"train --folder data --model_name model.yaml --output run --max_bad 1 --horizontal_flip 0.5 {STEPS}"
    printed = start(place, *run.split()).require(0).text
    assert r"“left \x1b[31m of a \x9b2J \u202e cat”" in printed
    assert "Skipped data/bad" in printed
    yield place


STEPS = "--max_steps 2 --val_share 0.2 --batch_size 4 --num_workers 0 --accelerator cpu"


class Ended:
    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, text

    def require(self, code: int) -> Ended:
        """This command, if it ended as expected, and no code or forged line is in what it printed."""
        assert self.code == code, self.text
        assert not codes(self.text, "\n\t"), ascii(self.text)
        assert not [line for line in self.text.split("\n") if line.startswith("Done after") and " steps." not in line]
        return self


def start(place: Path, *words: str) -> Ended:
    """Run a command in a folder; what it printed on both streams."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = forked.run(["-m", "train_clip.cli", *words], cwd=place, env=environment)
    return Ended(ended.returncode, ended.stdout + ended.stderr)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("data check data --num_workers 0 --cache false --json check.json", 1),
        ("data check twice --num_workers 0 --cache false", 1),
        ("train --folder twice --output other", 1),
        ("data npz data --image_size 16 --num_workers 0", 0),
        ("data show data --image_size 16 --number 99", 0),
        ("data split data --output split", 1),  # a name that is not UTF-8
        ("evaluate run --folder data --json scores.json --picture picture.png", 0),
        ("evaluate run --folder data --classes data/\x1b[2J.txt", 1),
        ("inspect run", 0),
        ("inspect \x1b[2J", 1),
        ("merge run/checkpoints/last.ckpt run/checkpoints/last.ckpt --folder data --json merged.json", 0),
        ("train --folder data --config \u202e", 2),
        ("\x9b2J", 2),
    ],
)
def test_no_command_prints_a_code(place: Path, words: str, code: int) -> None:
    """Whatever it has to say of them."""
    ended = start(place, *words.split(" ")).require(code)
    assert "Traceback" not in ended.text


def test_tensors_and_values_of_a_file(place: Path) -> None:
    """A checkpoint whose names, values and pickled globals are hostile: shown, converted or refused."""
    state = torch.load(place / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    odd = {f"other{evil}.weight": torch.ones(1) for evil in EVIL[:-1]}
    for name, held in {
        "values": state | {"hyper_parameters": state["hyper_parameters"] | {"note\x1b[2J": "\x1b]0;x\x07\n"}},
        "tensors": odd,
        "beside": state | {f"ema\x9b{number}": odd for number in range(3)},
        "config": {"state_dict": odd, "hyper_parameters": {"config": {"\x1b[2J": 1}}},
    }.items():
        torch.save(held, place / f"{name}.ckpt")
        for verb in (["inspect"], ["convert", "--to", "safetensors"]):
            ended = start(place, *verb, f"{name}.ckpt", *([f"{name}.safetensors"] if verb[1:] else []))
            ended.require(ended.code)
            assert "Traceback" not in ended.text


def test_a_table_of_them(place: Path) -> None:
    """Written by ``data split``: no cell is a formula, each image is found, each caption is the same."""
    for name in ("\udcff", "bad\udcff"):
        for suffix in ("png", "txt"):
            (place / "data" / f"{name}.{suffix}").rename(place / "data" / f"{name[:-1]}y.{suffix}")
    start(place, "data", "split", "data", "--output", "split", "--seed", "1").require(0)
    cells = []
    for part in ("train", "val", "test"):
        with (place / "split" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            cells += [cell for row in csv.reader(file) for cell in row]
        scan = scan_table(place / "split" / f"{part}.csv", SourceOptions()).require_pairs()
        assert not scan.lone_captions
        assert {tuple(pair.captions()) for pair in scan.pairs} <= {(CAPTION, FORMULAS[0]), ("a cat",)}
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert [cell for cell in cells if cell.startswith(" =cmd")]


def test_a_report_of_them(place: Path) -> None:
    """No text of ``data check --json`` begins as a formula."""
    start(place, *"data check data --num_workers 0 --cache false --json report.json".split()).require(1)

    def texts(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            for one in [*value, *value.values()] if isinstance(value, dict) else value:
                yield from texts(one)

    report = list(texts(json.loads((place / "report.json").read_text())))
    assert f" {FORMULAS[0]}" in report
    assert not [text for text in report if text.startswith(("=", "+", "-", "@", "\t", "\r"))]


# Each line goes out at once, as on a terminal.
UNBUFFERED = "import sys; sys.stdout.reconfigure(line_buffering=True); from train_clip import cli; cli.main()"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("data check data --num_workers 0 --cache false --json unread.json", ["unread.json"]),
        ("data split data --output unread", ["unread/train.csv", "unread/val.csv", "unread/test.csv"]),
        ("evaluate run/checkpoints/last.ckpt --folder data --json e.json --picture e.png", ["e.json", "e.png"]),
        (
            "merge run/checkpoints/last.ckpt run/checkpoints/last.ckpt --folder data --json m.json --output m "
            "--weight [0.25,0.75]",
            ["m.json", "m/merged-0.25.ckpt", "m/merged-0.75.ckpt"],
        ),
        ("data show data --image_size 16 --output unread.html", ["unread.html"]),
        ("convert run unread.safetensors", ["unread.safetensors"]),
    ],
)
def test_results_are_written_before_they_are_shown(place: Path, words: str, left: list[str]) -> None:
    """To a reader that has gone, as ``| head`` has: all files are there, and the exit code is that of SIGPIPE."""
    for path in (place / "data").glob("*\udcff*"):
        path.unlink()
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Path(os.devnull).open("w") as nothing:
        process = forked.start(
            ["-c", UNBUFFERED, *words.split()], stdout=writer, stderr=nothing, cwd=place, env=environment
        )
    os.close(writer)
    assert process.wait(200) == 141
    assert [name for name in left if not (place / name).is_file()] == []
