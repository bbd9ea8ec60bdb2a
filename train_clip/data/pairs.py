"""What a pair is, and a list of pairs that stays small: a million of them are read by every loader process.

A caption file → its lines. One caption a line, blank lines dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import html
import posixpath
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its captions: a file of them, or, out of a table, the captions themselves.

    Args:
        image: path of the image, by which the pair is known: its place in the order, on which side of a split it is.
        caption: path of the file of captions; empty where ``texts`` has them.
        texts: the captions.
        cache: path of the array that is read in place of the image; empty where there is none.
    """

    image: str
    caption: str = ""
    texts: tuple[str, ...] = ()
    cache: str = ""

    @property
    def pixels(self) -> str:
        """Path of what the pixels are read from."""
        return self.cache or self.image

    def captions(self) -> list[str]:
        """At least one caption.

        Raises:
            BadSample: they cannot be read, or hold NUL.
        """
        if not self.texts:
            return read_captions(self.caption)
        if any("\0" in text for text in self.texts):
            raise BadSample(self.image, "caption holds NUL")
        return list(self.texts)


class PairList(Sequence[Pair]):
    """Pairs in a few flat arrays, a hundred bytes or so each.

    As objects they would take three times that, and again in every loader process, whose counts of references would
    copy the pages that they share with this one.

    Args:
        root: folder that names are relative to.
        images: names of the images, POSIX paths below the root (or anywhere, where they are absolute).
        captions: names of the files of captions, likewise; or the captions themselves, lines joined.
        in_table: whether ``captions`` are themselves, of all the pairs or of each.
        caches: names of the arrays that are read in place of the images, empty for an image that has none; none at all
            where no image has one.
    """

    def __init__(
        self,
        root: str,
        images: Iterable[str],
        captions: Iterable[str],
        in_table: bool | Iterable[bool] = False,
        caches: Iterable[str] = (),
    ) -> None:
        self.root = root
        self.names = FlatStrings(images)
        self._captions = FlatStrings(captions)
        self._in_table = bytes([in_table] * len(self.names) if isinstance(in_table, bool) else in_table)
        self._caches = FlatStrings(caches)
        self.num_cached = sum(map(bool, self._caches))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        """Pair ``index``, its paths whole."""
        image = posixpath.join(self.root, self.names[index])
        captions = self._captions[index]
        name = self._caches[index] if self.num_cached else ""
        cache = posixpath.join(self.root, name) if name else ""
        if self._in_table[index]:
            return Pair(image, texts=tuple(captions.split("\n")), cache=cache)
        return Pair(image, posixpath.join(self.root, captions), cache=cache)

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same pairs in the same order."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Sequence[int]) -> PairList:
        """Some of the pairs, in the order of the indices."""
        return PairList(
            self.root,
            (self.names[index] for index in indices),
            (self._captions[index] for index in indices),
            (bool(self._in_table[index]) for index in indices),
            (self._caches[index] for index in indices) if self.num_cached else (),
        )

    def followed_by(self, other: PairList) -> PairList:
        """These pairs and then the others, whatever their roots; names are whole paths then."""
        return PairList(
            "",
            (pair.image for pair in chain(self, other)),
            ("\n".join(pair.texts) or pair.caption for pair in chain(self, other)),
            (bool(pair.texts) for pair in chain(self, other)),
            (pair.cache for pair in chain(self, other)),
        )


class FlatStrings:
    """Strings in one block of UTF-8, found by where each ends.

    Args:
        strings: any; names that are not UTF-8 come back as they were.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        block, ends = bytearray(), array("q")
        for string in strings:
            block += string.encode("utf-8", "surrogateescape")
            ends.append(len(block))
        self._block, self._ends = bytes(block), ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """String ``index``, from 0 on."""
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return self._block[start : self._ends[index]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def shown(name: str | bytes) -> str:
    """A name that can be printed on one line: bytes that are not UTF-8 and control characters are escaped."""
    key = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return key.decode("utf-8", "backslashreplace").translate(_CONTROL)


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {9: r"\t", 10: r"\n", 13: r"\r"}


def plain_name(name: str) -> str:
    """A name as all systems write it: macOS takes letters and their accents apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
