"""The class of an image. Folders and .cls files that are as they should be: tests/commands/test_evaluate.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from train_clip.errors import UserError
from train_clip.evaluation.zero_shot import image_labels


def test_a_class_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """A Latin-1 .cls file: a UserError with its path."""
    (tmp_path / "a.cls").write_bytes("bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.cls: is not UTF-8"):
        image_labels([str(tmp_path / "a.png")], ["bear"])
