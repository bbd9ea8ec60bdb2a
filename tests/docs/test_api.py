"""``docs/api.md`` against the code, and against what the documents import."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import train_clip
from tests.docs.test_documents import DOCUMENTS, blocks
from train_clip import options

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### `(train_clip\.[\w.]+)`$", PAGE, re.MULTILINE)


def generator() -> dict[str, Any]:
    """The script's names."""
    return runpy.run_path(str(ROOT / "docs" / "api.py"))


def found(name: str) -> Any:
    """What an entry is about."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        try:
            return resolve_name(f"{'.'.join(parts[:at])}:{'.'.join(parts[at:])}")
        except ImportError:
            continue
    raise LookupError(name)


def test_the_page_is_what_the_script_writes():
    assert generator()["page"]() == PAGE, "run `python docs/api.py`"


def test_the_stub_of_the_options_is_what_the_script_writes():
    assert generator()["stub"]() == (ROOT / "train_clip" / "keywords.pyi").read_text(encoding="utf-8")


def test_every_public_name_is_on_the_page_once():
    """The package's own names, and each that a document imports from one of its modules, if only in a sentence."""
    imported = set()
    for document in set(DOCUMENTS) - {ROOT / "docs" / "api.md"}:
        for block in blocks(document, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("train_clip."):
                    imported |= {(node.module, alias.name) for alias in node.names}
    assert len(imported) > 10
    groups = re.findall(r"^\*\*(\w+Options)\.\*\* ", PAGE, re.MULTILINE)
    for module, name in sorted(imported):
        is_there = hasattr(importlib.import_module(module), name)  # and not an example's own
        assert not is_there or name in groups or f".{name}`" in PAGE, (module, name)
    assert sorted({f"train_clip.{name}" for name in train_clip.__all__} - set(ENTRIES)) == []
    assert len(set(ENTRIES)) == len(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_explained(name):
    """Each has a docstring of its own, and a function's parameters stand in its signature."""
    thing = found(name)
    assert thing.__doc__ and not thing.__doc__.startswith(f"{thing.__name__}("), "only what a dataclass gives itself"
    part = PAGE.split(f"### `{name}`\n")[1].split("\n##")[0]
    for parameter in inspect.signature(thing).parameters.values() if inspect.isroutine(thing) else ():
        assert parameter.name == "self" or f"{parameter.name}: " in part, parameter


def test_every_option_is_on_the_page():
    """Each with its help and default."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)\|$", PAGE, re.MULTILINE))
    for name, value in options.TrainingOptions().flat().items():
        shown = f'"{value}"' if isinstance(value, str) else repr(value)
        assert f"`{shown}` | " in rows[name], name


def test_how_things_are_written():
    """Types without their modules, defaults as values, keywords after a star, formulas indented, letters explained."""
    names = generator()

    def example(one: Path | None, *, two: tuple[int, ...] = (1,), **rest: Any) -> train_clip.ModelConfig:
        """Do it."""

    assert names["signature"](example).splitlines()[1] == (
        "example(one: Path | None, *, two: tuple[int, ...] = (1,), **rest: Any) -> ModelConfig"
    )
    assert "\n\n    S = scale · rows columnsᵀ" in PAGE
    assert "Letters: B pairs on this process; N pairs of the global batch; D embedding width." in PAGE
    assert "- `mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)`: of each channel" in PAGE
