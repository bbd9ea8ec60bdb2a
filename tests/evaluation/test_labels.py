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


def labels(folder: Path, cls: bytes, classes: list[str]) -> list[int]:
    (folder / "a.cls").write_bytes(cls)
    return image_labels([str(folder / "a.png")], classes)


@pytest.mark.parametrize(
    ("cls", "classes", "expected"),
    [
        (b"\xef\xbb\xbfdog\r\n", ["cat", "dog"], 1),
        (b"\xef\xbb\xbf1\n\n", ["cat", "dog"], 1),
        (b"cafe\xcc\x81", ["cat", "caf\u00e9"], 1),  # as macOS spells a folder's name
        (b"hot  dog", ["cat", "Hot_Dog"], 1),
        (b"3", ["5", "3"], 1),  # a name, not the fourth class
    ],
)
def test_cls_files_that_are_read(tmp_path, cls, classes, expected):
    """A byte order mark, line ends and blanks are no part of a name or number; names come before numbers."""
    assert labels(tmp_path, cls, classes) == [expected]


@pytest.mark.parametrize(
    ("cls", "classes", "expected"),
    [
        (b"2", ["cat", "dog"], "its class is '2'"),
        (b"-1", ["cat", "dog"], "its class is '-1'"),
        (b"0", ["5", "3"], "its class is '0'"),  # names and places would be mixed up
        (b"cat\ndog\n", ["cat", "dog"], r"a\.cls: 2 lines\. Expected one"),
        (b" \n", ["cat", "dog"], r"a\.cls: is empty\. Expected the name or number of a class"),
        (b"\xff\xfec\x00", ["cat", "dog"], r"a\.cls: is UTF-16, not UTF-8"),
    ],
)
def test_cls_files_that_are_refused(tmp_path, cls, classes, expected):
    """A number of no class, one where classes are named by numbers, several classes, none."""
    with pytest.raises(UserError, match=expected):
        labels(tmp_path, cls, classes)
