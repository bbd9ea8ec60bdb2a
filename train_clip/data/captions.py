"""A caption file → its lines. One caption a line, blank lines dropped."""

from __future__ import annotations

import re
from pathlib import Path

from train_clip.errors import BadSample

ENDLESS_ENTITY = re.compile(r"&#\d{4300}")  # html.unescape raises: int() takes 4,300 digits (sys.int_info)


def read_captions(path: str) -> list[str]:
    r"""Read every caption of a file.

    Args:
        path: UTF-8 text, with or without a byte order mark. Lines end in LF or CRLF and nowhere else: U+2028 and the
            other separators that ``str.splitlines`` knows belong to the caption.

    Returns:
        At least one caption, each without blanks at its ends.

    Raises:
        BadSample: the file cannot be read, is not UTF-8, holds NUL or an endless entity, or holds only blanks.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample(path, "caption is not UTF-8") from None
    except OSError as error:
        raise BadSample(path, f"caption cannot be read ({type(error).__name__})") from None
    if "\0" in text:
        raise BadSample(path, "caption holds NUL")
    if ENDLESS_ENTITY.search(text):
        raise BadSample(path, "caption holds an endless HTML entity")
    captions = [line for line in (line.strip() for line in text.split("\n")) if line]
    if not captions:
        raise BadSample(path, "caption is empty")
    return captions
