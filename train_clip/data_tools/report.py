"""What an audit found, in figures.

Which 64-bit hashes are nearly equal, without comparing all with all.

Two numbers that differ in at most K bits agree entirely in one of K + 1 pieces that both are cut into. So only those
that share a piece are compared (multi-index hashing: Norouzi, Punjani, Fleet, CVPR 2012).

U  different hashes

What is there more than once, and what of it would be in training and in validation.

U  different perceptual hashes

What of the arrays that are read in place of images would stop a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from train_clip.data.crops import NORMALISED
from train_clip.data.images import is_npz
from train_clip.data.pairs import PairList, shown
from train_clip.data.scan import Scan
from train_clip.data.split import held_out_indices
from train_clip.data_tools.facts import AuditStore, caption_digest, perceptual_hash
from train_clip.errors import BadSample

NEAR_BITS = 4  # of 64; what recompression and resizing change in a pHash
BLOCK = 2**20  # comparisons at a time


def near_pairs(
    hashes: NDArray[np.uint64], most: int = NEAR_BITS
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Find the pairs of hashes that differ in at most ``most`` bits.

    Args:
        hashes: (U,) uint64, all different.
        most: bits.

    Yields:
        Places (n,) and (n,) of two such hashes each. A pair can come more than once.
    """
    edges = np.linspace(0, 64, most + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        piece = (hashes >> low) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(piece[order]) != 0])
        ends = np.r_[starts[1:], len(order)]
        shared = ends - starts > 1
        for start, end in zip(starts[shared], ends[shared], strict=True):
            yield from _compare(hashes, order[start:end], most)


def _compare(
    hashes: NDArray[np.uint64], places: NDArray[np.int64], most: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All with all, in blocks of rows."""
    here = hashes[places]
    rows = max(1, BLOCK // len(places))
    for start in range(0, len(places), rows):
        different = _count_bits(here[start : start + rows, None] ^ here[None, start:])
        one, other = np.nonzero(different <= most)
        later = other > one
        if later.any():
            yield places[start + one[later]], places[start + other[later]]


# Bits that are set in each 16-bit number.
_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)


def _count_bits(numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return _BITS[np.ascontiguousarray(numbers).view(np.uint16).reshape(*numbers.shape, 4)].sum(-1, dtype=np.uint8)


EXAMPLES = 5


@dataclass(frozen=True)
class Repeats:
    """Images that are there more than once.

    Args:
        equal: images whose file is byte for byte that of another pair.
        equal_groups: names of the pairs of each of the largest groups of equal images.
        near: images that look like a different one, by their perceptual hash; None where the library is missing.
        near_examples: two such names each.
    """

    equal: int
    equal_groups: list[list[str]]
    near: int | None
    near_examples: list[list[str]]


@dataclass(frozen=True)
class Leaks:
    """What of the held-out pairs is in the training pairs too.

    Args:
        held_out: pairs that training would hold out.
        images: those whose image is byte for byte that of a training pair.
        images_nearly: those whose image looks like that of a training pair; None where the library is missing.
        captions: those of which a caption is, to the model, one of a training pair.
        examples: names of those counted in ``images``.
    """

    held_out: int
    images: int
    images_nearly: int | None
    captions: int
    examples: list[str]


def find_repeats(store: AuditStore, held_out: Sequence[int]) -> tuple[Repeats, Leaks]:
    """Find equal and similar images, and what the held-out pairs share with the others.

    Args:
        store: the facts of all pairs.
        held_out: places of the pairs that training would hold out.
    """
    with store.database as database:
        database.execute("CREATE TEMP TABLE held_out (held INTEGER PRIMARY KEY)")
        database.executemany("INSERT INTO held_out VALUES (?)", ((place,) for place in held_out))
    near, near_leaks, near_examples = (None, None, []) if perceptual_hash() is None else _near(store)
    of_content = "SELECT COUNT(*) AS n, content FROM pairs WHERE content != x'' GROUP BY content HAVING n > 1"
    largest = store.rows(f"{of_content} ORDER BY n DESC, content LIMIT ?", EXAMPLES)
    equal = Repeats(
        equal=store.one(f"SELECT COALESCE(SUM(n), 0) FROM ({of_content})")[0],
        equal_groups=[
            list(_names(store, "SELECT name FROM pairs WHERE content = ? ORDER BY name LIMIT ?", content, EXAMPLES))
            for _, content in list(largest)
        ],
        near=near,
        near_examples=near_examples,
    )
    return equal, _leaks(store, len(held_out), near_leaks)


def _leaks(store: AuditStore, held_out: int, nearly: int | None) -> Leaks:
    images = list(
        _names(
            store,
            f"SELECT name FROM pairs JOIN held_out ON place = held WHERE content != x'' AND content IN "
            f"(SELECT content FROM {TRAINING}) ORDER BY name",
        )
    )
    trained = f"SELECT tokens FROM {TRAINING} JOIN captions ON pair = id"
    captions = store.one(
        "SELECT COUNT(DISTINCT id) FROM pairs JOIN held_out ON place = held JOIN captions ON pair = id "
        f"WHERE tokens IN ({trained})"
    )[0]
    return Leaks(held_out, len(images), nearly, captions, images[:EXAMPLES])


def _near(store: AuditStore) -> tuple[int, int, list[list[str]]]:
    """How many images look like a different one, how many held-out ones like one of training, and some of them."""
    columns = "look, COUNT(DISTINCT content), COUNT(*), COUNT(held), MIN(place)"
    rows = store.rows(
        f"SELECT {columns} FROM pairs LEFT JOIN held_out ON place = held WHERE look IS NOT NULL GROUP BY look"
    )
    table = np.fromiter((value for row in rows for value in row), dtype=np.int64).reshape(-1, 5)
    looks, contents, images, held, place = table[:, 0].astype(np.uint64), *table[:, 1:].T
    # Images of one look and different contents are similar by themselves.
    similar = contents > 1
    leaking = similar & (images > held)
    within = "SELECT name, MIN(place) FROM pairs WHERE look = ? GROUP BY content ORDER BY MIN(place) LIMIT 2"
    examples = [[shown(name) for name, _ in store.rows(within, int(look))] for look in table[similar, 0][:EXAMPLES]]
    for one, other in near_pairs(looks):
        similar[one] = similar[other] = True
        # Several places of one hash may be among them, so that |= on an index would keep the last alone.
        leaking[one[images[other] > held[other]]] = True
        leaking[other[images[one] > held[one]]] = True
        for two in zip(place[one], place[other], strict=True):
            if len(examples) == EXAMPLES:
                break
            named = [next(_names(store, "SELECT name FROM pairs WHERE place = ?", int(at))) for at in two]
            # The same two come once for each piece that they share.
            if named not in examples:
                examples.append(named)
    return int(images[similar].sum()), int(held[leaking].sum()), examples


# Pairs that are not held out.
TRAINING = "(SELECT * FROM pairs LEFT JOIN held_out ON place = held WHERE held IS NULL)"


def _names(store: AuditStore, query: str, *values: object) -> Iterator[str]:
    return (shown(name) for (name,) in store.rows(query, *values))


def array_problems(pairs: PairList, store: AuditStore, image_size: int, val_pairs: int | None) -> list[str]:
    """Find arrays of another size than the model's, and lists that hold both kinds of pixels.

    Args:
        pairs: all of them.
        store: the facts of all of them.
        image_size: side of the model's square.
        val_pairs: how many of the pairs, the last of the list, are a list of their own.

    Returns:
        A message for each kind of problem.
    """
    if not pairs.num_cached and not any(map(is_npz, pairs.names)):
        return []
    problems = []
    sizes = store.rows(
        "SELECT place, MIN(width, height) FROM pairs WHERE width > 0 AND MIN(width, height) != ? ORDER BY place",
        image_size,
    )
    wrong = [(pairs[place].pixels, side) for place, side in sizes if is_npz(pairs[place].pixels)]
    if wrong:
        problems.append(
            f"{len(wrong):,} arrays are not of the model's {image_size} pixels, for instance {shown(wrong[0][0])} "
            f"({wrong[0][1]}); `train-clip data npz --image_size {image_size}` makes them anew."
        )
    division = len(pairs) - (val_pairs or 0)
    for start, end in ((0, division), (division, len(pairs))):
        legible, normalised = (
            store.one(
                f"SELECT COUNT(*) FROM pairs WHERE width > 0 AND place >= ? AND place < ? {condition}", start, end
            )[0]
            for condition in ("", f"AND id IN (SELECT pair FROM mended WHERE what = '{NORMALISED}')")
        )
        if 0 < normalised < legible:
            problems.append(
                f"{normalised:,} of {legible:,} images are arrays of already normalised pixels, the others pictures; "
                "expected one kind."
            )
    return problems


QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class Expectations:
    """What training would be told.

    Args:
        image_size: side of the model's square, in pixels.
        context_length: tokens of a caption at most, start and end included.
        val_share: share of the pairs held out for validation.
        val_pairs: how many pairs, the last of the list, are validated on in place of a share; None for the share.
        max_bad: share of the pairs that may be unreadable.
    """

    image_size: int = 224
    context_length: int = 77
    val_share: float = 0.05
    max_bad: float = 0.01
    val_pairs: int | None = None


@dataclass(frozen=True)
class Listed:
    """How many there are, and the first few of them."""

    number: int
    examples: list[str]


@dataclass(frozen=True)
class Sizes:
    """Upright images, at the quantiles 0, 0.05, 0.5, 0.95 and 1.

    Args:
        width: pixels.
        height: pixels.
        aspect: longer side over shorter side.
        enlarged: images whose shorter side is below the model's.
    """

    width: list[int]
    height: list[int]
    aspect: list[float]
    enlarged: int


@dataclass(frozen=True)
class Captions:
    """All lines of all pairs.

    Args:
        lines: how many.
        most_lines: of one pair.
        median_tokens: of a line, without start and end.
        cut: lines over the context.
        tokens_cut: tokens that this takes off, over all of them.
        longest: tokens of the longest line.
        longest_in: the image of that line.
        repeated: lines whose words stand in another line too.
        repeated_nearly: lines that differ from another in letters that the tokenizer does not keep, and only in them.
        most_repeated: how often each of the most frequent lines stands there, and what it says.
    """

    lines: int
    most_lines: int
    median_tokens: float
    cut: int
    tokens_cut: int
    longest: int
    longest_in: str
    repeated: int
    repeated_nearly: int
    most_repeated: list[tuple[int, str]]


@dataclass(frozen=True)
class Report:
    """All of it.

    Args:
        source: folder or table.
        entries: files, or rows.
        pairs: images with captions.
        cached: how many of them are read from npz/, in place of the image.
        lone_images: images without captions.
        lone_captions: captions without images.
        others: files that are neither, by suffix.
        folder_links: links to folders, which are not followed.
        faults: what no run can begin with.
        bad_pairs: pairs with a file that cannot be used.
        bad: those files, by reason.
        mended: how many pairs have what is mended at each reading.
        sizes: of the images; None where none can be read.
        captions: None where none can be read.
        repeats: images that are there more than once.
        leaks: between training and validation.
        problems: why training would not begin, or would stop.
    """

    source: str
    entries: int
    pairs: int
    cached: int
    lone_images: Listed
    lone_captions: Listed
    others: dict[str, int]
    folder_links: Listed
    faults: list[str]
    bad_pairs: int
    bad: dict[str, list[str]]
    mended: dict[str, Listed]
    sizes: Sizes | None
    captions: Captions | None
    repeats: Repeats
    leaks: Leaks
    problems: list[str]


def build_report(scan: Scan, store: AuditStore, expected: Expectations) -> Report:
    """Put the figures together.

    Args:
        scan: the pairs.
        store: the facts of all of them.
        expected: what they are held against.
    """
    bad: dict[str, list[str]] = {}
    for path, reason in store.rows("SELECT path, reason FROM bad ORDER BY reason, path"):
        bad.setdefault(reason, []).append(shown(path))
    bad_pairs = store.one("SELECT COUNT(DISTINCT pair) FROM bad")[0]
    held_out: Sequence[int] = held_out_indices(scan.pairs, expected.val_share)
    if expected.val_pairs is not None:
        held_out = range(len(scan.pairs) - expected.val_pairs, len(scan.pairs))
    repeats, leaks = find_repeats(store, held_out)
    return Report(
        source=str(scan.source),
        entries=scan.num_entries,
        pairs=len(scan.pairs),
        cached=scan.pairs.num_cached,
        lone_images=_listed(scan.lone_images),
        lone_captions=_listed(scan.lone_captions),
        others=dict(scan.others),
        folder_links=_listed(scan.folder_links),
        faults=scan.faults,
        bad_pairs=bad_pairs,
        bad=bad,
        mended=_mended(store),
        sizes=_sizes(store, expected.image_size),
        captions=_captions(store, scan.pairs, expected.context_length - 2),
        repeats=repeats,
        leaks=leaks,
        problems=_problems(scan, bad_pairs, len(held_out), expected)
        + array_problems(scan.pairs, store, expected.image_size, expected.val_pairs),
    )


def _listed(names: Sequence[str]) -> Listed:
    return Listed(len(names), [shown(name) for name in names[:EXAMPLES]])


def _mended(store: AuditStore) -> dict[str, Listed]:
    counts = store.rows("SELECT what, COUNT(*) FROM mended GROUP BY what ORDER BY what")
    of = "SELECT name FROM pairs JOIN mended ON pair = id WHERE what = ? ORDER BY name LIMIT ?"
    return {what: Listed(count, [shown(name) for (name,) in store.rows(of, what, EXAMPLES)]) for what, count in counts}


def _sizes(store: AuditStore, image_size: int) -> Sizes | None:
    sides = np.fromiter(
        (side for row in store.rows("SELECT width, height FROM pairs WHERE width > 0") for side in row), dtype=np.int32
    ).reshape(-1, 2)
    if not len(sides):
        return None
    aspect = sides.max(1) / sides.min(1)
    width, height = (
        np.quantile(column, QUANTILES, method="nearest").astype(int).tolist() for column in (sides[:, 0], sides[:, 1])
    )
    rounded = [round(value, 3) for value in np.quantile(aspect, QUANTILES, method="nearest").tolist()]
    return Sizes(width, height, rounded, int((sides.min(1) < image_size).sum()))


def _captions(store: AuditStore, pairs: PairList, room: int) -> Captions | None:
    lengths = np.fromiter((length for (length,) in store.rows("SELECT length FROM captions")), dtype=np.int32)
    if not len(lengths):
        return None
    over = lengths[lengths > room] - room
    longest_in = store.one("SELECT name FROM pairs JOIN captions ON pair = id ORDER BY length DESC, name LIMIT 1")[0]
    # Lines of which there is another with the same words, and then with the same tokens.
    repeated = "SELECT COALESCE(SUM(n), 0) FROM (SELECT COUNT(*) AS n FROM captions GROUP BY {}) WHERE n > 1"
    by_words, by_tokens = (store.one(repeated.format(column))[0] for column in ("text", "tokens"))
    frequent = store.rows(
        "SELECT COUNT(*) AS n, text, MIN(place) FROM captions JOIN pairs ON pair = id GROUP BY text HAVING n > 1 "
        "ORDER BY n DESC, text LIMIT ?",
        EXAMPLES,
    )
    return Captions(
        lines=len(lengths),
        most_lines=store.one("SELECT MAX(n) FROM (SELECT COUNT(*) AS n FROM captions GROUP BY pair)")[0],
        median_tokens=float(np.median(lengths)),
        cut=len(over),
        tokens_cut=int(over.sum()),
        longest=int(lengths.max()),
        longest_in=shown(longest_in),
        repeated=by_words,
        repeated_nearly=by_tokens - by_words,
        most_repeated=[(count, _text(pairs, place, text)) for count, text, place in frequent],
    )


def _problems(scan: Scan, bad_pairs: int, held_out: int, expected: Expectations) -> list[str]:
    problems = []
    if scan.faults:
        problems.append(f"{len(scan.faults):,} faults, listed above.")
    if not scan.pairs:
        problems.append("There is no pair.")
    elif expected.val_pairs == 0:
        problems.append("There is no pair to validate on (--val_pairs).")
    elif len(scan.pairs) - held_out < 2:
        problems.append("There are fewer than 2 pairs to train on.")
    if bad_pairs > expected.max_bad * len(scan.pairs):
        problems.append(
            f"{bad_pairs:,} of {len(scan.pairs):,} pairs ({bad_pairs / len(scan.pairs):.1%}) cannot be used, more than "
            f"--max_bad {expected.max_bad:g}."
        )
    return problems


def _text(pairs: PairList, place: int, digest: bytes) -> str:
    """The caption of a digest, out of its pair."""
    with contextlib.suppress(BadSample):
        return next((text for text in pairs[place].captions() if caption_digest(text) == digest), "")
    return ""
