"""What is installed: the lazy public names, and the files that are not code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import train_clip
from train_clip.encoders.sources import SOURCES
from train_clip.optional import PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_importing_the_package_imports_nothing_heavy():
    """``import train_clip`` without torch; each public name is found when it is asked for."""
    code = "import sys, train_clip; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert all(getattr(train_clip, name).__name__ == name for name in train_clip.__all__)
    with pytest.raises(AttributeError, match="CLIPWrapper"):
        train_clip.Clip  # noqa: B018


def test_packages_that_are_never_required_are_not_imported_at_the_top():
    """No module of the package imports torchvision, timm, open_clip or transformers when it is imported itself."""
    for path in (ROOT / "train_clip").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            )
            roots = {(name or "").split(".")[0] for name in names}
            assert not roots & {"torchvision", "timm", "open_clip", "transformers"}, path


def test_what_messages_say_to_install():
    """``pip install NAME``: of an extra or of a library of encoders, which helps with or without a checkout."""
    extras = {re.split(r"[\[<>=]", one)[0] for group in PROJECT["optional-dependencies"].values() for one in group}
    told = set()
    for path in (ROOT / "train_clip").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        told |= set(re.findall(r"pip install ([^\s`{]+\w)", text))
        libraries = re.findall(r"(?:find_library|optional)\(\"(\w+)", text)
        told |= {PACKAGES.get(name, name) for name in libraries}
        assert "train-clip[" not in text, path
    of_encoders, others = {"transformers", "timm", "torchvision"}, {"ImageHash", "huggingface_hub"}
    assert of_encoders | others | {"pyarrow", "usearch", "starlette", "uvicorn", "scikit-learn"} <= told
    assert told <= extras | set(SOURCES)


def test_the_version_and_the_command(tmp_path):
    """The version is the one that pyproject.toml reads; ``python -m train_clip`` is the command, from any folder."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", train_clip.__version__)
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    command = [sys.executable, "-m", "train_clip", "models"]
    path = {"PYTHONPATH": str(ROOT), "PATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert result.returncode == 0 and "ViT-B/32" in result.stdout, result.stderr


@pytest.mark.slow
def test_the_wheel_holds_presets_recipes_and_merges(tmp_path):
    """Everything below the package that is not code is in the wheel, which has the version of the code."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.startswith(f"train_clip-{train_clip.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [path for path in (ROOT / "train_clip").rglob("*") if path.suffix in (".yaml", ".gz", ".typed", ".html")]
    assert {path.relative_to(ROOT).as_posix() for path in data} <= names
