"""``docs/extending.md``: each example is applied to a copy of the package, touches as many files as it says, runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests import forked
from tests.conftest import TINY, write_pairs

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
CORE = Path("train_clip")
MIXER = TINY | {"name": "mixer", "image": {"size": 16, "mixer_patch": 4, "layers": 2, "width": 16}}


class Example(NamedTuple):
    """A section of the document."""

    name: str
    num_files: int  # that the table says it touches
    new: dict[str, str]  # file and its text
    edits: list[tuple[str, str]]  # file and a hunk of its difference
    commands: list[str]


def examples() -> Iterator[Example]:
    """The sections, in their order."""
    counts = dict(re.findall(r"^\| \[([^]]+)\]\(#\S+\) \| (\d) \|", DOCUMENT, re.MULTILINE))
    for section in DOCUMENT.split("\n## ")[1:]:
        name, example = section.split("\n")[0], Example("", 0, {}, [], [])
        file = ""
        for new, edited, language, text in re.findall(
            r"^New: `(\S+)`$|^In `(\S+)`$|^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
        ):
            file = new or edited or file
            if language == "python":
                example.new[file] = text
            elif language == "diff":
                example.edits.append((file, text))
            elif language == "sh":
                example.commands.extend(text.splitlines())
        yield example._replace(name=name, num_files=int(counts[name[0].lower() + name[1:]]))


EXAMPLES = {example.name: example for example in examples()}


def apply(hunk: str, text: str) -> str:
    """Edit a text: the hunk's old lines stand in it once, and become its new ones."""
    old, new = (
        "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in kept)
        for kept in (("", " ", "-"), ("", " ", "+"))
    )
    assert text.count(f"\n{old}") == 1, f"not once in the file:\n{old}"
    return text.replace(f"\n{old}", f"\n{new}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs, their captions as COCO has them, and two models."""
    folder = tmp_path_factory.mktemp("extending")
    images = sorted(write_pairs(folder / "data", 12).glob("*.png"))
    annotations = [{"image_id": place, "caption": f"picture {place}"} for place in range(len(images))]
    content = {"images": [{"id": place, "file_name": file.name} for place, file in enumerate(images)]}
    (folder / "data" / "captions.json").write_text(json.dumps(content | {"annotations": annotations}))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "mixer.yaml").write_text(yaml.safe_dump(MIXER))
    return folder


def extended(example: Example, folder: Path) -> Path:
    """A copy of the package with the example applied; its parent is what ``PYTHONPATH`` names."""
    ignored = shutil.ignore_patterns("__pycache__")
    package = Path(shutil.copytree(ROOT / CORE, folder / "with" / CORE, ignore=ignored))
    for name, text in example.new.items():
        assert not (ROOT / name).exists()
        (package.parent / name).write_text(text, encoding="utf-8")
    for name, hunk in example.edits:
        file = package.parent / name
        file.write_text(apply(hunk, file.read_text(encoding="utf-8")), encoding="utf-8")
    return package


def run(command: str, package: Path, folder: Path) -> str:
    """What a command prints on the copy."""
    words = shlex.split(command)
    assert words[0] == "train-clip"
    if words[1] == "train":
        words += "--accelerator cpu --log_every_n_steps 1 --num_workers 0".split()
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    result = forked.run(["-m", "train_clip.cli", *words[1:]], cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


def losses(run_folder: Path) -> list[float]:
    with (run_folder / "logs" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def usual(data: Path) -> list[float]:
    """The losses of the same run by the package as it is."""
    beside = data.with_name(f"{data.name}-usual")
    words = "--folder data --model_name tiny.yaml --batch_size 4 --max_steps 2"
    run(f"train-clip train {words} --output {beside}", ROOT / CORE, data)
    return losses(beside)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name, data, usual, tmp_path):
    """As many files differ as the document says, and its commands do what it is for."""
    example = EXAMPLES[name]
    package = extended(example, tmp_path)
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    here = ROOT / CORE
    touched = [
        file
        for file in files
        if not (here / file).is_file() or (here / file).read_bytes() != (package / file).read_bytes()
    ]
    assert len(touched) == example.num_files == len({*example.new, *dict(example.edits)})
    folder = Path(shutil.copytree(data, tmp_path / "here"))
    said = [run(command, package, folder) for command in example.commands]
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    if name == "A loss":
        assert config["loss"] == "smoothed" and losses(folder / "run") != usual
    elif name == "An optimizer":
        # The first step has seen no update yet: the loss of the second differs.
        assert config["optimizer"] == "lion"
        assert losses(folder / "run")[0] == usual[0] and losses(folder / "run")[1] != usual[1]
    elif name == "An evaluator":
        found = json.loads((folder / "scores.json").read_text())["gap"]["distance"]
        assert 0 < found < 2 and f"{found:.3f}" in said[-1]
    elif name == "A switch of the training step":
        assert config["embedding_noise"] == 0.1 and losses(folder / "run") != usual
        resumed = run("train-clip train --resume run --max_steps 3", package, folder)
        assert "after 2 steps" in resumed and len(losses(folder / "run")) == 3
    elif name == "A kind of image tower":
        assert "R@1" in said[-1]
    elif name == "A source of data":
        assert "12 pairs" in said[-1] and config["coco"] == "data/captions.json"
    else:
        pytest.fail(f"{name}: no check of it here")


def test_the_table_is_complete():
    """Six kinds of additions, 2, 2, 2, 2, 2 and 3 files."""
    assert [example.num_files for example in EXAMPLES.values()] == [2, 2, 2, 2, 2, 3]
