"""A caption file → its lines. One caption a line, blank lines dropped."""

from __future__ import annotations

import codecs
import contextlib
import html
from pathlib import Path
from typing import NamedTuple

from train_clip.errors import BadSample

MAX_BYTES = 2**20  # of a file; what is longer is something else than captions


class CaptionLines(NamedTuple):
    """The captions of a file, and what had to be mended to get them.

    Args:
        captions: at least one, each without blanks at its ends.
        mended: in words that are the same for every file that was mended alike.
    """

    captions: list[str]
    mended: tuple[str, ...]


def read_captions(path: str) -> list[str]:
    """Read every caption of a file, as ``read_caption_lines``, for who does not ask what was mended."""
    return read_caption_lines(path).captions


def read_caption_lines(path: str) -> CaptionLines:
    r"""Read every caption of a file.

    Args:
        path: UTF-8 text, with or without a byte order mark. Lines end in LF or CRLF and nowhere else: U+2028 and the
            other separators that ``str.splitlines`` knows belong to the caption.

    Raises:
        BadSample: the file cannot be read, is not UTF-8, holds NUL, holds only blanks, or is over ``MAX_BYTES``.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadSample(path, f"caption cannot be read ({type(error).__name__})") from None
    if len(content) > MAX_BYTES:
        raise BadSample(path, f"caption file over {MAX_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise BadSample(path, "caption is UTF-16, not UTF-8" if wide else "caption is not UTF-8") from None
    if "\0" in text:
        raise BadSample(path, "caption holds NUL")
    captions = [line for line in (line.strip() for line in text.split("\n")) if not is_blank(line)]
    if not captions:
        raise BadSample(path, "caption is empty")
    mended = []
    if content.startswith(codecs.BOM_UTF8):
        mended.append("byte order mark dropped")
    if b"\r\n" in content:
        mended.append("line ends CR LF")
    return CaptionLines(captions, tuple(mended))


def is_blank(caption: str) -> bool:
    """Whether nothing is left of a caption once its entities are read: ``&nbsp;`` is a blank."""
    if "&" in caption:
        # An entity of over 4,300 digits, at which int() stops, is text.
        with contextlib.suppress(ValueError):
            caption = html.unescape(caption)
    return not caption.strip()
