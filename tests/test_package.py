"""What is installed: the lazy public names, and the files that are not code."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import train_clip

ROOT = Path(__file__).parents[1]


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


@pytest.mark.slow
def test_the_wheel_holds_presets_recipes_and_merges(tmp_path):
    """Everything below the package that is not code is in the wheel."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    data = [path for path in (ROOT / "train_clip").rglob("*") if path.suffix in (".yaml", ".gz", ".typed")]
    assert {path.relative_to(ROOT).as_posix() for path in data} <= names
