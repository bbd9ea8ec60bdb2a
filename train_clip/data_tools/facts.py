"""The facts of pairs: every file opened, decoded and hashed once, with the results kept in the user's cache."""

import hashlib
import os
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from train_clip import errors, files
from train_clip.commands.progress import in_workers
from train_clip.data import crops, images, tokenizer
from train_clip.data.pairs import Pair, PairList, read_caption_lines
from train_clip.models import clip
from train_clip.shards.members import stamp_of

KEPT_EVERY = 1024  # pairs that a kill may lose; or an eighth of them, where that is more
FORMAT = 4  # to be raised when what is kept, or what is found bad, changes
# Faults that may be gone the next time though the files have not changed.
PASSING = ("cannot be read", "file does not exist", "no permission", "too large for memory")

PAIR = np.dtype([
    ("key", "u8"),  # a digest of its names and the stamps of its files; 0 where it is to be looked at again
    ("sides", "i4", 2),  # width and height of the upright image in pixels; 0 where it cannot be read
    ("content", "S32"),  # a digest of the image's file; empty where the image cannot be read
    ("look", "i8"),  # the 64 bits of its perceptual hash; 0 without the image or the library
    ("note", "i4"),  # which of the notes says what is bad and mended
])  # fmt: skip


class Facts:
    """What is known of all pairs, in flat arrays by their places: a hundred bytes or so each.

    A note's lines are what is bad of the captions and of the image, empty for nothing, and what is mended.
    """

    def __init__(self, num_pairs: int, context_length: int) -> None:
        self.context_length = context_length  # where captions are cut
        self.pairs = np.zeros(num_pairs, PAIR)
        self.notes = {"\n": 0}
        self._captions = array("Q")

    @property
    def captions(self) -> np.ndarray:
        """(M, 4): the place of each caption's pair, its words, its tokens as they are cut, and its length uncut."""
        return np.array(self._captions).reshape(-1, 4)

    def add(self, place: int, key: int, image: Any, note: str, captions: Any) -> None:
        """Take what ``audit`` found of a pair; a fault that may pass is not kept for the next time."""
        passes = any(part in note for part in PASSING)
        self.pairs[place] = (0 if passes else key, *image, self.notes.setdefault(note, len(self.notes)))
        for caption in captions:
            self._captions.extend((place, *caption))

    def recall(self, file: Path, keys: np.ndarray) -> None:
        """Take from a file the facts of pairs whose keys are the same."""
        with np.load(file) as kept:
            if kept["about"] != _about():
                return
            pairs, notes, captions = kept["pairs"], kept["notes"].tolist(), kept["captions"]
            shorter, longer = sorted((self.context_length, int(kept["context_length"])))
        if shorter < longer:  # captions that are cut elsewhere, or no more, are looked at again
            pairs["key"][captions[captions[:, 3] > shorter - 2, 0]] = 0
        _, new, old = np.intersect1d(keys, pairs["key"], return_indices=True)
        self.pairs[new] = pairs[old]
        self.notes = {note: code for code, note in enumerate(notes)}
        places = np.full(len(pairs), len(keys))
        places[old] = new
        captions[:, 0] = places[captions[:, 0]]
        self._captions = array("Q", captions[captions[:, 0] < len(keys)].tobytes())

    def keep(self, file: Path | None) -> Path | None:
        """Write what is known of the present pairs to a file; None where that cannot be."""
        try:
            if file is not None:
                with files.replacing(file) as beside, beside.open("wb") as out:
                    known: Any = {"notes": list(self.notes), "pairs": self.pairs, "captions": self.captions}
                    np.savez(out, about=_about(), context_length=self.context_length, **known)
            return file
        except OSError as error:
            print(f"Results cannot be saved in the cache folder ({error}); continuing without.")
            return None


def _about() -> str:
    return f"{FORMAT} {PIL.__version__} {perceptual_hash() is not None}"


def look_at(pairs: PairList, sources: list[Path], context_length: int, num_workers: int | None, cache: bool) -> Facts:
    """Look at all pairs but those whose files have not changed since; what is found is kept by the sources' names.

    Two processes at once repeat each other's work, no more.
    """
    facts = Facts(len(pairs), context_length)
    # Taken before the files are opened: what changes from here on is looked at again the next time.
    keys = np.fromiter(map(_key, pairs.names, pairs), np.uint64, len(pairs))
    # Lists for training and validation can name one image twice: each is a pair of its own.
    keys[np.unique(keys, return_index=True)[1]] ^= 1
    file = None
    if cache:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111, never raises
        paths = [source.resolve() for source in sources]
        digest = hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()[:16]
        file = folder / "train-clip" / "scans" / f"{paths[0].name[:40]}-{digest}.npz"
        try:
            facts.recall(file, keys)
        except Exception:  # there is none yet; or whatever a damaged one makes NumPy raise: it is written anew
            facts = Facts(len(pairs), context_length)
    places = np.flatnonzero(facts.pairs["key"] == 0).tolist()
    if len(places) < len(pairs):
        print(f"{len(pairs) - len(places):,} of {len(pairs):,} pairs have not changed since the last check.")
    due = KEPT_EVERY
    try:
        looks = in_workers(partial(audit, pairs, tokenizer.Tokenizer(context_length)), places, num_workers, "pairs")
        for number, (place, found) in enumerate(zip(places, looks, strict=True), 1):
            facts.add(place, keys[place], *found)
            if number >= due:
                due = number + max(KEPT_EVERY, number // 8)
                file = facts.keep(file)
    finally:
        facts.keep(file)
    return facts


def _key(name: str, pair: Pair) -> int:
    stamps = (stamp_of(path) or "gone" for path in (pair.pixels, pair.caption) if path)
    return words_digest("\0".join([name, *pair.texts, *stamps]))


def audit(pairs: PairList, tokens_of: tokenizer.Tokenizer, place: int) -> tuple[Any, str, Any]:
    """Look at the pair at a place.

    Returns:
        ``sides``, ``content`` and ``look`` as in PAIR; the note; and of each caption the digests of its words and of
        its tokens, which are cut, and how many tokens, uncut.
    """
    pair, phash, note = pairs[place], perceptual_hash(), ["", ""]
    image: Any = ((0, 0), "", 0)
    captions: Any = ()
    try:
        texts, mended = (pair.captions(), ()) if pair.texts else read_caption_lines(pair.caption)
        tokens, _ = tokens_of.batch(texts)
        ids = clip.caption_ids(tokens, clip.up_to_end(tokens)).numpy().view(np.uint64).tolist()
        captions = list(zip(map(words_digest, texts), ids, map(len, tokens_of.encode(texts)), strict=True))
        note += mended
    except errors.BadSample as error:
        note[0] = error.reason
    try:
        picture, mended = crops.read_picture(pair.pixels)
        with images.reading(pair.pixels, "image"), files.opened(pair.pixels) as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        image = picture.size, content, phash(picture) if phash else 0
        note += mended
    except errors.BadSample as error:
        note[1] = error.reason
    return image, "\n".join(note), captions


def words_digest(text: str) -> int:
    """What stands for a caption's words."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def perceptual_hash() -> Any:
    """ImageHash's pHash as a signed 64-bit number; None where the library is not installed."""
    try:
        import imagehash
    except ImportError:
        return None
    return lambda picture: int(np.packbits(imagehash.phash(picture).hash).view(">i8")[0])
