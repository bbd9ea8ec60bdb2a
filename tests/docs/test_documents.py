"""The documents against the program: every command parses, README's run, the printed tree is the real one."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import forked
from tests.adapters.tiny_families import save
from tests.conftest import TINY, write_pairs
from tests.encoders import save_bert, save_resnet
from train_clip import cli
from train_clip.commands import demo as demo_module

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train.py": "train", "train_finetune.py": "finetune", "train_finetune_vpt.py": "prompt-tune"}
TRAINING = ("train", "finetune", "prompt-tune")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


LOCAL_ENCODERS = ["--image_encoder", "hf:resnet", "--text_encoder", "hf:bert"]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(document: Path) -> list[list[str]]:
    """Our own commands, the verb (of one word or two) first; pip, make and pytest are for CI itself."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line.split(" > ")[0].split("&&")[-1])
        if words[:1] == ["train-clip"]:
            verb, rest = cli.split_verb(words[1:])
            found.append([str(verb), *rest])
        elif words[:1] == ["python"] and words[1] in SCRIPTS:
            found.append([SCRIPTS[words[1]], *words[2:]])
        elif words[:1] == ["torchrun"]:
            found.append(words[words.index("train_clip.cli") + 1 :])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_documented_command_parses(document, tmp_path, monkeypatch):
    """No command in a document has an option that the parser does not know. What is resumed is there, empty."""
    monkeypatch.chdir(tmp_path)
    for verb, *words in commands(document):
        if "--resume" in words:
            run = tmp_path / words[words.index("--resume") + 1]
            (run / "checkpoints").mkdir(parents=True)
            (run / "checkpoints" / "last.ckpt").touch()
            (run / "config.yaml").write_text("folder: data_dir\n", encoding="utf-8")
        cli.parse(verb, ["ViT-B/32" if word == "CHECKPOINT" else word for word in words])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_is_left_and_every_picture_is_there(document):
    """What a table was to replace is replaced, and linked files exist."""
    text = document.read_text(encoding="utf-8")
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", text, re.MULTILINE)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.fixture(scope="module")
def as_a_newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run (one epoch, one picture a scene) and ``data_dir`` holds twelve pairs."""
    folder = tmp_path_factory.mktemp("newcomer")
    train = demo_module.train

    def short(*groups: Any) -> Path:
        *options, run, trainer = groups
        return train(*options, replace(run, epochs=1), trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo_module, "COPIES", 1)
        patch.setattr(demo_module, "train", short)
        cli.main(["demo"])
    write_pairs(folder / "data_dir", 12)
    save_resnet(folder / "resnet"), save_bert(folder / "bert")
    save("siglip", folder / "siglip2")
    return folder


def test_readme_commands_run(as_a_newcomer, monkeypatch):
    """README's commands in their order, word for word; training is stopped after one step, what is resumed after two.

    Each is a process of its own, as real models are in some. ``runs/NAME`` is the second run that was trained. The
    search page is made, but not served.
    """
    monkeypatch.chdir(as_a_newcomer)
    monkeypatch.setattr("train_clip.search.page.serve", lambda build, port: build())
    monkeypatch.setenv("XDG_CACHE_HOME", str(as_a_newcomer / "cache"))
    verbs, printed = [], ""
    for verb, *words in commands(ROOT / "README.md"):
        if "--resume" in words:
            words = [*(word.replace("runs/NAME", "run2") for word in words), "--max_steps", "2"]
        elif verb in TRAINING:
            words += ["--max_steps", "1"] + ["--output", f"run{len(verbs)}"] * ("--output" not in words)
            # In place of the hub's encoders, which this machine may not reach.
            words += LOCAL_ENCODERS if verb == "finetune" else []
        if "--page" in words:
            cli.main([verb, *words])
        elif verb != "demo":
            ended = forked.run(["-m", "train_clip", *verb.split(), *words])
            assert ended.returncode == 0, (verb, words, ended.stderr)
            printed += ended.stdout
        verbs.append(verb)
    assert verbs == [
        *"demo train train train finetune finetune train evaluate embed convert prompt-tune inspect convert".split(),
        *"data check,data show".split(","),
        *"evaluate evaluate embed train embed search search".split(),
    ]
    assert "zero-shot over 48 classes" in printed


def test_documented_python_runs(as_a_newcomer):
    """README's, exactness.md's and checkpoints.md's Python, each block as a script of its own."""
    documents = ("README.md", "docs/exactness.md", "docs/checkpoints.md")
    found = [block for document in documents for block in blocks(ROOT / document, "python")]
    assert len(found) == 4
    for block in found:
        ended = forked.run(["-c", block], cwd=as_a_newcomer)
        assert ended.returncode == 0, ended.stderr


def test_every_test_that_a_document_names_is_there():
    """exactness.md's table: each file exists, and each function in it."""
    named = re.findall(
        r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "exactness.md").read_text(encoding="utf-8")
    )
    assert len(named) > 20
    for file, function in named:
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), (file, function)


def test_the_printed_tree_is_the_real_one():
    """Every path in README's tree exists, and everything in the package's folder is in the tree."""
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("train-clip/"))
    printed: set[str] = set()
    parents: list[str] = []
    for line in tree.splitlines()[1:]:
        prefix, name = re.match(r"^([│ ]*)[├└]── (\S+)", line).groups()
        parents[len(prefix) // 4 :] = [name.rstrip("/")]
        printed.add("/".join(parents))
    assert [path for path in printed if not (ROOT / path).exists()] == []
    package = {
        f"train_clip/{path.name}"
        for path in (ROOT / "train_clip").iterdir()
        if not path.name.startswith(("_", "py.")) and path.suffix != ".pyi"
    }
    assert package - printed == set()


@pytest.mark.parametrize("recipe", sorted((ROOT / "train_clip" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs_a_step(recipe, tmp_path, monkeypatch):
    """A shipped recipe parses and trains, on twelve pairs: as the verb of its name, or from scratch."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "data_dir", 12)
    start: list[str] = []
    if recipe.stem == "finetune":
        save_resnet(tmp_path / "resnet"), save_bert(tmp_path / "bert")
        start = LOCAL_ENCODERS
    elif recipe.stem == "finetune-clip":
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
        cli.main("train --model_name tiny.yaml --folder data_dir --max_steps 1 --output clip".split())
        start = ["--pretrained", "clip/checkpoints/last.ckpt"]
    short = "--folder data_dir --max_steps 1 --output run".split()
    words = ["finetune" if start else "train", "--config", recipe.stem, *start, *short]
    # A process of its own: some models are large.
    forked.run(["-m", "train_clip", *words], check=True)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_the_core_is_as_short_as_readme_says():
    """Fewer than 12,500 lines, as shipped, without the extensions that the import contract lists."""
    assert "fewer than 12,500 lines of Python" in (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {one["name"]: one for one in project["tool"]["importlinter"]["contracts"]}
    edge = contracts["The core knows no extension"]["forbidden_modules"]
    extensions = {name.removeprefix("train_clip.") for name in edge}
    files = [file for file in (ROOT / "train_clip").rglob("*.py") if not extensions & set(file.parts)]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 12_500
