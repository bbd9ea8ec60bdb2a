"""A pair → what is to be known of it before it is trained on: every file opened, decoded and hashed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from train_clip.data.captions import read_caption_lines
from train_clip.data.pairs import Pair, PairList
from train_clip.data.pixels import read_picture
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import BadSample
from train_clip.types import Skip

BATCH = 16  # pairs that travel together from a worker


class CaptionFacts(NamedTuple):
    """One caption.

    Args:
        text: a digest of its words.
        tokens: a digest of its tokens: the same for captions that a model cannot tell apart.
        length: tokens, without start and end, uncut.
    """

    text: bytes
    tokens: bytes
    length: int


class PairFacts(NamedTuple):
    """One pair.

    Args:
        place: in the list of pairs.
        bad: its files that cannot be used.
        mended: what is mended whenever it is read.
        width: pixels of the upright image; 0 where it cannot be read.
        height: likewise.
        content: a digest of the image's file; empty where the image cannot be read.
        look: the 64 bits of its perceptual hash, as a signed number; None without the library.
        captions: all of them; none where they cannot be read.
    """

    place: int
    bad: tuple[Skip, ...]
    mended: tuple[str, ...]
    width: int
    height: int
    content: bytes
    look: int | None
    captions: tuple[CaptionFacts, ...]


def audit_loader(pairs: PairList, places: Sequence[int], num_workers: int) -> DataLoader[Any]:
    """Look at some of the pairs; yields lists of ``PairFacts`` in the order of the places."""
    audit = Audit(pairs, places, perceptual_hash())
    return DataLoader(audit, batch_size=BATCH, num_workers=num_workers, collate_fn=list)


class Audit(Dataset[PairFacts]):
    """The facts of pairs.

    Args:
        pairs: all there are.
        places: which of them to look at.
        look: a picture's perceptual hash; None to do without.
    """

    def __init__(
        self, pairs: PairList, places: Sequence[int], look: Callable[[Image.Image], int] | None = None
    ) -> None:
        self.pairs = pairs
        self.places = places
        self.look = look
        self.tokenizer = Tokenizer()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> PairFacts:
        """Look at the pair at place ``places[index]``."""
        place = self.places[index]
        pair = self.pairs[place]
        bad: list[Skip] = []
        captions, mended = self._captions(pair, bad)
        try:
            picture, image_mended = read_picture(pair.pixels)
            with open(pair.pixels, "rb") as file:  # noqa: PTH123, a third of the time
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except (BadSample, OSError) as error:
            reason = error.reason if isinstance(error, BadSample) else "file is gone"
            return PairFacts(place, (*bad, Skip(pair.pixels, reason)), mended, 0, 0, b"", None, captions)
        look = None if self.look is None else self.look(picture)
        mended = mended + image_mended
        return PairFacts(place, tuple(bad), mended, picture.width, picture.height, content, look, captions)

    def _captions(self, pair: Pair, bad: list[Skip]) -> tuple[tuple[CaptionFacts, ...], tuple[str, ...]]:
        try:
            texts, mended = (pair.captions(), ()) if pair.texts else read_caption_lines(pair.caption)
        except BadSample as error:
            bad.append(Skip(error.path, error.reason))
            return (), ()
        facts = []
        for text, ids in zip(texts, self.tokenizer.encode(texts), strict=True):
            tokens = np.array(ids, dtype="<u2").tobytes()
            facts.append(CaptionFacts(caption_digest(text), _short(tokens), len(ids)))
        return tuple(facts), mended


def caption_digest(text: str) -> bytes:
    """What stands for a caption's words."""
    return _short(text.encode("utf-8", "surrogatepass"))


def perceptual_hash() -> Callable[[Image.Image], int] | None:
    """ImageHash's pHash as a signed 64-bit number; None where the library is not installed."""
    return None if find_spec("imagehash") is None else _phash


def _phash(picture: Image.Image) -> int:
    import imagehash

    return int(np.packbits(imagehash.phash(picture).hash).view(">i8")[0])


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
