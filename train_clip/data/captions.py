"""A caption file → its lines. One caption a line, blank lines dropped."""

from __future__ import annotations

from pathlib import Path

from train_clip.errors import BadSample


def read_captions(path: str) -> list[str]:
    r"""Read every caption of a file.

    Args:
        path: UTF-8 text, with or without a byte order mark. Lines end in LF or CRLF and nowhere else: U+2028 and the
            other separators that ``str.splitlines`` knows belong to the caption.

    Returns:
        At least one caption, each without blanks at its ends.

    Raises:
        BadSample: the file cannot be read, is not UTF-8, holds NUL, or holds only blanks.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample(path, "caption is not UTF-8") from None
    except OSError as error:
        raise BadSample(path, f"caption cannot be read ({type(error).__name__})") from None
    if "\0" in text:
        raise BadSample(path, "caption holds NUL")
    captions = [line for line in (line.strip() for line in text.split("\n")) if line]
    if not captions:
        raise BadSample(path, "caption is empty")
    return captions
