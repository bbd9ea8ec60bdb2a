"""Pairs, their captions, which of them are held out, and a compact list for millions of pairs."""

import hashlib
import os
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from train_clip.data.tokenizer import is_empty
from train_clip.errors import BadSample, UserError
from train_clip.files import MAX_CAPTIONS, opened

MARK = "\ufeff"  # of the order of bytes
IN_TABLE = "\0"  # begins captions that stand in place of their file's name, which cannot hold it


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its captions: a file of them, or, out of a table, the captions themselves."""

    image: str  # its path, by which the pair is known: its place in the order, on which side of a split it is
    caption: str = ""  # path of the file of captions; empty where ``texts`` has them
    texts: tuple[str, ...] = ()
    cache: str = ""  # path of the array that is read in place of the image; empty where there is none

    @property
    def pixels(self) -> str:
        """Path of what the pixels are read from."""
        return self.cache or self.image

    def captions(self) -> list[str]:
        """At least one caption; ``BadSample`` where they cannot be read, or hold NUL."""
        if not self.texts:
            return read_caption_lines(self.caption)[0]
        if any("\0" in text for text in self.texts):
            raise BadSample(self.image, "caption contains NUL")
        return list(self.texts)


class FlatStrings(Sequence[str]):
    """Strings in one block of UTF-8, found by where each ends; names that are not UTF-8 come back as they were."""

    def __init__(self, strings: Iterable[str]) -> None:
        block, ends = bytearray(), array("q", [0])
        for string in strings:
            block += string.encode("utf-8", "surrogateescape")
            ends.append(len(block))
        self._block, self._ends = bytes(block), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if index < 0:
            raise IndexError(index)
        return self._block[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class PairList(Sequence[Pair]):
    """Pairs in a few flat arrays, a hundred bytes or so each.

    Objects would take three times that, and be copied into every loader process by their counts of references.

    Args:
        root: folder that names are relative to; they are POSIX paths, which may be absolute.
        images: names of the images.
        captions: names of the files of captions; or IN_TABLE and the captions themselves, lines joined.
        caches: names of the arrays that are read in place of the images, or empty; none at all where no image has one.
    """

    def __init__(
        self, root: str, images: Iterable[str] = (), captions: Iterable[str] = (), caches: Iterable[str] = ()
    ) -> None:
        self.root, self.names = root, FlatStrings(images)
        self._columns = self.names, FlatStrings(captions), FlatStrings(caches or [""] * len(self.names))
        self.num_cached = sum(map(bool, self._columns[2]))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        image, captions, cache = (column[index] for column in self._columns)
        image, cache = os.path.join(self.root, image), cache and os.path.join(self.root, cache)  # noqa: PTH118
        if captions.startswith(IN_TABLE):
            return Pair(image, texts=tuple(captions[1:].split("\n")), cache=cache)
        return Pair(image, os.path.join(self.root, captions), cache=cache)  # noqa: PTH118

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def per_epoch(self) -> int:
        """How many pairs an epoch has."""
        return len(self)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The places of an epoch's pairs, (``per_epoch``) int64, shuffled: each pair once."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def take(self, indices: Sequence[int]) -> "PairList":
        """Some of the pairs, in the order of the indices."""
        return PairList(self.root, *(map(column.__getitem__, indices) for column in self._columns))

    def followed_by(self, other: "PairList") -> "PairList":
        """These pairs and then the others, whatever their roots; names are whole paths then."""
        rows = [
            (pair.image, IN_TABLE + "\n".join(pair.texts) if pair.texts else pair.caption, pair.cache)
            for pairs in (self, other)
            for pair in pairs
        ]
        return PairList("", *zip(*rows, strict=True))


def split_pairs(pairs: PairList, share: float) -> tuple[PairList, PairList]:
    """Hold out round(share · len(pairs)), chosen by a hash of the image's name; none instead of a single one.

    The choice depends on names alone: not on a seed, so that runs can be compared, nor on where the folder lies.
    """
    held_out = held_out_indices(pairs, share)
    kept = set(held_out)
    return pairs.take([index for index in range(len(pairs)) if index not in kept]), pairs.take(held_out)


def held_out_indices(pairs: PairList, share: float) -> list[int]:
    """The places of the pairs that ``split_pairs`` holds out, in order."""
    number = round(share * len(pairs))
    if number < 2:
        return []

    def digest(index: int) -> bytes:
        return hashlib.sha256(plain_name(pairs.names[index]).encode("utf-8", "surrogateescape")).digest()

    return sorted(sorted(range(len(pairs)), key=digest)[:number])


def read_caption_lines(path: str) -> tuple[list[str], tuple[str, ...]]:
    """Read every caption of a file in UTF-8, one a line, without blanks around; and in the same words what was mended.

    Lines end in LF or CRLF and nowhere else: U+2028 and the other separators that ``str.splitlines`` knows belong to
    the caption.

    Raises:
        BadSample: the file cannot be read, is not UTF-8, holds NUL, has only empty captions, or is over
            ``MAX_CAPTIONS``.
    """
    text = read_captions(path)
    captions = [line.strip() for line in text.removeprefix(MARK).split("\n") if not is_empty(line)]
    mended = {"byte order mark dropped": text.startswith(MARK), "CR LF line endings": "\r\n" in text}
    return captions, tuple(what for what, found in mended.items() if found)


def read_captions(path: str) -> str:
    """The text of a file of captions, or of names, as it is; errors as for ``read_caption_lines``."""
    try:
        with opened(path) as file:
            content = file.read(MAX_CAPTIONS + 1)
    except UserError:
        raise
    except FileExistsError:
        raise BadSample(path, "not a regular file") from None
    except OSError as error:
        raise BadSample(path, f"caption cannot be read ({type(error).__name__})") from None
    if len(content) > MAX_CAPTIONS:
        raise BadSample(path, f"caption file over {MAX_CAPTIONS:,} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise BadSample(path, "caption is UTF-16, not UTF-8" if utf16 else "caption is not UTF-8") from None
    if "\0" in text:
        raise BadSample(path, "caption contains NUL")
    if all(map(is_empty, text.removeprefix(MARK).split("\n"))):
        raise BadSample(path, "caption is empty")
    return text


def plain_name(name: str) -> str:
    """A name as all systems write it: macOS takes letters and their accents apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
