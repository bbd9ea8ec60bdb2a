"""Caption files: bytes as people's programs write them, against the lines that a person would read."""

from __future__ import annotations

import codecs
import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_clip.data.pairs import read_caption_lines
from train_clip.data.tokenizer import Tokenizer, is_empty
from train_clip.errors import BadSample
from train_clip.files import MAX_CAPTIONS

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines cuts, apart from \r and \n

READABLE = {
    "one line": (b"a cat", ["a cat"]),
    "ends in a line break": (b"a cat\n", ["a cat"]),
    "several lines": (b"a cat\na dog\na bird\n", ["a cat", "a dog", "a bird"]),
    "CRLF": (b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
    "LF and CRLF mixed": (b"a cat\r\na dog\na bird", ["a cat", "a dog", "a bird"]),
    "byte order mark": (codecs.BOM_UTF8 + b"a cat\na dog", ["a cat", "a dog"]),
    "blank lines between": (b"\n\n  a cat  \n \t \r\n\n\ta dog\n\n", ["a cat", "a dog"]),
    "the same line twice": (b"a cat\na cat\n", ["a cat", "a cat"]),
    "letters beyond ASCII": ("ein Bär\n猫\n🐈".encode(), ["ein Bär", "猫", "🐈"]),
    "blanks within": (b"a  cat\tsits", ["a  cat\tsits"]),
    "characters that say something": (
        "?\n…\n❤\ufe0f\n&amp;\n&#8203;a\nя\n\ufffd".encode(),
        ["?", "…", "❤\ufe0f", "&amp;", "&#8203;a", "я", "\ufffd"],
    ),
    "other separators": (f"a{SEPARATORS}cat\na dog".encode(), [f"a{SEPARATORS}cat", "a dog"]),
}

BAD = {
    "empty": (b"", "caption is empty"),
    "blank": (b" \n\t\r\n\xc2\xa0\n", "caption is empty"),
    "only a byte order mark": (codecs.BOM_UTF8, "caption is empty"),
    "control characters": (b"\x01\x02\n\x7f \x1f", "caption is empty"),
    "an escape sequence": (b"\x1b[0m", "caption is empty"),
    "a byte order mark, read as Latin-1": ("ï»¿".encode(), "caption is empty"),
    "format characters": ("\u200b\u200d\n\xad\n\ufe0f\n\u2060\ufeff".encode(), "caption is empty"),
    "entities": (b"&amp;nbsp; &#8203;&shy;", "caption is empty"),
    "letters that fill": ("\u3164\u115f\uffa0\u2800".encode(), "caption is empty"),
    "NUL": (b"a cat\na \x00 dog", "caption contains NUL"),
    "Latin-1": (b"ein B\xe4r", "caption is not UTF-8"),
    "cut within a letter": ("a 猫".encode()[:-1], "caption is not UTF-8"),
    "UTF-16 with its mark": ("a cat".encode("utf-16"), "caption is UTF-16, not UTF-8"),
    "UTF-16 of the other order": (codecs.BOM_UTF16_BE + "a cat".encode("utf-16-be"), "caption is UTF-16, not UTF-8"),
    "nothing but the mark of UTF-16": (codecs.BOM_UTF16_LE, "caption is UTF-16, not UTF-8"),
    "UTF-16 without": ("a cat".encode("utf-16-le"), "caption contains NUL"),
    "a JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "caption is not UTF-8"),
}


MENDED = {
    "nothing": (b"a cat\na dog\n", ()),
    "a CR within a line": (b"a\rcat\n", ()),
    "blanks and empty lines": (b"  a cat \n\n", ()),
    "a mark within the text": ("a \ufeffcat".encode(), ()),
    "byte order mark": (codecs.BOM_UTF8 + b"a cat\n", ("byte order mark dropped",)),
    "one line end of many": (b"a cat\r\na dog\n", ("CR LF line endings",)),
    "the last line's end": (b"a cat\r\n", ("CR LF line endings",)),
    "both": (codecs.BOM_UTF8 + b"a cat\r\na dog", ("byte order mark dropped", "CR LF line endings")),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended(tmp_path: Path, name: str) -> None:
    """What a text editor would show of the bytes, in the same words for every file; the captions are without it."""
    content, expected = MENDED[name]
    (tmp_path / "a.txt").write_bytes(content)
    captions, mended = read_caption_lines(str(tmp_path / "a.txt"))
    assert mended == expected
    assert captions == read_caption_lines(str(tmp_path / "a.txt"))[0]
    assert not any("\r\n" in caption or caption.startswith("\ufeff") for caption in captions)


@pytest.mark.parametrize("letter", [b"a", b" ", b"a cat\n", "猫".encode(), b"\0", b"\xff"])
def test_a_file_of_a_mebibyte(tmp_path: Path, letter: bytes) -> None:
    """One byte over 2 to the 20th is refused for its size alone; as many bytes as that are looked into."""
    assert MAX_CAPTIONS == 1_048_576
    path = tmp_path / "a.txt"
    path.write_bytes((letter * MAX_CAPTIONS)[: MAX_CAPTIONS + 1])
    with path.open("ab") as file:
        file.write(b"a" * (MAX_CAPTIONS + 1 - path.stat().st_size))
    with pytest.raises(BadSample) as caught:
        read_caption_lines(str(path))[0]
    assert caught.value.reason == "caption file over 1,048,576 bytes"
    path.write_bytes(b"a" * MAX_CAPTIONS)
    assert read_caption_lines(str(path))[0] == ["a" * MAX_CAPTIONS]


@pytest.mark.parametrize("name", READABLE)
def test_readable(tmp_path: Path, name: str) -> None:
    """Files that hold captions, against their lines in the file's order."""
    content, lines = READABLE[name]
    (tmp_path / "a.txt").write_bytes(content)
    assert read_caption_lines(str(tmp_path / "a.txt"))[0] == lines


@pytest.mark.parametrize("name", BAD)
def test_bad(tmp_path: Path, name: str) -> None:
    """Files that hold none: the path, and the same few words for the same fault."""
    content, reason = BAD[name]
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(BadSample) as caught:
        read_caption_lines(str(path))[0]
    assert (caught.value.path, caught.value.reason) == (str(path), reason)
    assert str(caught.value) == f"{path}: {reason}"


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """A file that is gone and a folder in its place are bad samples, not errors of their own kind."""
    for path in (tmp_path / "gone.txt", tmp_path):
        with pytest.raises(BadSample, match="caption cannot be read") as caught:
            read_caption_lines(str(path))[0]
        assert caught.value.path == str(path)


@given(content=st.binary(max_size=60))
def test_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the bytes: stripped, non-blank lines that are found in the text in order, or a bad sample."""
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        captions = read_caption_lines(str(path))[0]
    except BadSample:
        return
    assert captions
    assert all(caption and caption == caption.strip() and "\n" not in caption for caption in captions)
    rest = content.decode("utf-8-sig")
    for caption in captions:
        rest = rest[rest.index(caption) + len(caption) :]


def test_what_makes_no_token_is_empty_and_so_is_what_no_one_sees() -> None:
    """Every space, mark, sign, control and format character alone: with no token it is empty; as is what is not shown
    (Unicode's Zs, Zl, Zp, Cc, Cf).
    """  # noqa: D205
    letters = [chr(code) for code in range(0x110000)]
    letters = [letter for letter in letters if unicodedata.category(letter) not in ("Cn", "Co", "Cs")]
    hidden = {letter for letter in letters if unicodedata.category(letter) in ("Zs", "Zl", "Zp", "Cc", "Cf")}
    others = [letter for letter in letters if not letter.isalnum()]
    empty = {letter for letter in others if is_empty(letter)}
    assert {letter for letter in others if not Tokenizer().encode([letter])[0]} <= empty
    assert hidden <= empty
    assert not any(map(is_empty, string.ascii_letters + string.digits + string.punctuation + "猫äяé́"))
