"""What an audit found, in figures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train_clip.data.audit.arrays import array_problems
from train_clip.data.audit.facts import caption_digest
from train_clip.data.audit.repeats import EXAMPLES, Leaks, Repeats, find_repeats
from train_clip.data.audit.store import AuditStore
from train_clip.data.pairs import PairList, shown
from train_clip.data.scan import Scan
from train_clip.data.split import held_out_indices
from train_clip.errors import BadSample

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
