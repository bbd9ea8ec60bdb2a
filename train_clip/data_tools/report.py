"""What was found, in figures: what is bad, mended, cut, repeated, or would be in training and validation."""

from __future__ import annotations

import contextlib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train_clip.data.crops import NORMALISED
from train_clip.data.images import is_npz
from train_clip.data.pairs import Pair, PairList, shown
from train_clip.data.scan import Scan
from train_clip.data.split import held_out_indices
from train_clip.data_tools.facts import Facts, perceptual_hash, words_digest
from train_clip.errors import BadSample
from train_clip.options import PairOptions, at_least, option

EXAMPLES = 5
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
NEAR_BITS = 4  # of 64; what recompression and resizing change in a pHash

Places = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class CheckOptions(PairOptions):
    """What the pairs are held against, and where the report goes."""

    image_size: int = option(224, "side of the model's square in pixels", at_least(1))
    context_length: int = option(77, "tokens of a caption at most, start and end included", at_least(2))
    num_workers: int | None = option(None, "processes that read; default: one a core", at_least(0))
    cache: bool = option(
        True, "keep what is found in the user's cache folder, and look again only at files that changed"
    )
    json: Path | None = option(None, "a file to write the report to")


@dataclass(frozen=True)
class Listed:
    """How many there are, and the first few of them."""

    number: int
    examples: list[str]


@dataclass(frozen=True)
class Sizes:
    """Upright images, at the quantiles 0, 0.05, 0.5, 0.95 and 1."""

    width: list[int]  # pixels
    height: list[int]  # pixels
    aspect: list[float]  # longer side over shorter side
    enlarged: int  # images whose shorter side is below the model's


@dataclass(frozen=True)
class Captions:
    """All lines of all pairs."""

    lines: int
    most_lines: int  # of one pair
    median_tokens: float  # of a line, without start and end
    cut: int  # lines over the context
    tokens_cut: int  # what this takes off, over all of them
    longest: int  # tokens of the longest line
    longest_in: str  # the image of that line
    repeated: int  # lines whose words stand in another line too
    repeated_nearly: int  # lines that differ from another only in letters that the tokenizer does not keep
    most_repeated: list[tuple[int, str]]  # how often the most frequent lines stand there, and what they say


@dataclass(frozen=True)
class Repeats:
    """Images that are there more than once."""

    equal: int  # whose file is byte for byte that of another pair
    equal_groups: list[list[str]]  # names of the pairs of the largest groups of equal images
    near: int | None  # that look like a different one, by their perceptual hash; None without the library
    near_examples: list[list[str]]  # two such names each


@dataclass(frozen=True)
class Leaks:
    """What of the held-out pairs is in the training pairs too."""

    held_out: int
    images: int  # whose image is byte for byte that of a training pair
    images_nearly: int | None  # whose image looks like that of a training pair; None without the library
    captions: int  # of which a caption is, to the model, one of a training pair
    examples: list[str]  # names of those counted in ``images``


@dataclass(frozen=True)
class Report:
    """All of it."""

    source: str  # folder or table
    entries: int  # files, or rows
    pairs: int  # images with captions
    cached: int  # pairs that are read from npz/, in place of the image
    lone_images: Listed
    lone_captions: Listed
    others: dict[str, int]  # files that are neither image nor caption, by suffix
    folder_links: Listed  # which are not followed
    faults: list[str]  # what no run can begin with
    bad_pairs: int
    bad: dict[str, list[str]]  # files that cannot be used, by reason
    mended: dict[str, Listed]  # pairs that have what is mended at each reading
    sizes: Sizes | None  # None where no image can be read
    captions: Captions | None  # None where none can be read
    repeats: Repeats
    leaks: Leaks
    problems: list[str]  # why training would not begin, or would stop


def build_report(scan: Scan, facts: Facts, options: CheckOptions, val_pairs: int | None = None) -> Report:
    """Put the figures together.

    Args:
        scan: the pairs.
        facts: of all of them.
        options: what they are held against.
        val_pairs: how many pairs, the last of the list, are validated on in place of a share.
    """
    pairs = scan.pairs
    held_out = np.arange(len(pairs)) >= len(pairs) - (val_pairs or 0)
    if val_pairs is None:
        held_out[held_out_indices(pairs, options.val_share)] = True
    bad, mended = _notes(pairs, facts)
    repeats, leaks = find_repeats(pairs, facts, held_out)
    report = Report(
        source=str(scan.source),
        entries=scan.num_entries,
        pairs=len(pairs),
        cached=pairs.num_cached,
        lone_images=_listed(scan.lone_images),
        lone_captions=_listed(scan.lone_captions),
        others=dict(scan.others),
        folder_links=_listed(scan.folder_links),
        faults=scan.faults,
        bad_pairs=len({place for _, _, place in bad}),
        bad={reason: [shown(path) for _, path, _ in some] for reason, some in groupby(sorted(bad), itemgetter(0))},
        mended={what: Listed(len(at), _first(pairs, at)) for what, at in sorted(mended.items())},
        sizes=_sizes(facts.pairs["sides"], options.image_size),
        captions=_captions(pairs, facts, options.context_length - 2),
        repeats=repeats,
        leaks=leaks,
        problems=[],
    )
    report.problems.extend(_problems(report, options, val_pairs))
    report.problems.extend(
        _array_problems(pairs, facts, mended.get(NORMALISED, []), options.image_size, val_pairs or 0)
    )
    return report


def _notes(pairs: PairList, facts: Facts) -> tuple[list[tuple[str, bytes, int]], dict[str, list[int]]]:
    """Reason, path and place of each bad file, and the places of what is mended."""
    bad: list[tuple[str, bytes, int]] = []
    mended: dict[str, list[int]] = defaultdict(list)
    for (of_captions, of_image, *whats), code in facts.notes.items():
        places = np.flatnonzero(facts.pairs["note"] == code).tolist() if code else []
        for what in whats:
            mended[what] += places
        for place in places if of_captions or of_image else []:
            pair = pairs[place]
            files = ((of_captions, pair.caption or pair.image), (of_image, pair.pixels))
            bad += [(reason, _bytes(path), place) for reason, path in files if reason]
    return bad, mended


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _listed(names: Sequence[str]) -> Listed:
    return Listed(len(names), [shown(name) for name in names[:EXAMPLES]])


def _first(pairs: PairList, places: Iterable[int]) -> list[str]:
    return [shown(name) for name in heapq.nsmallest(EXAMPLES, (_bytes(pairs.names[at]) for at in places))]


def _sizes(sides: NDArray[np.int32], image_size: int) -> Sizes | None:
    sides = sides[sides[:, 0] > 0]
    if not len(sides):
        return None
    columns = np.c_[sides, sides.max(1) / sides.min(1)]
    width, height, aspect = np.quantile(columns, QUANTILES, axis=0, method="nearest").T.tolist()
    enlarged = int((sides.min(1) < image_size).sum())
    return Sizes([*map(int, width)], [*map(int, height)], [round(value, 3) for value in aspect], enlarged)


def _captions(pairs: PairList, facts: Facts, room: int) -> Captions | None:
    places, words, tokens, lengths = facts.captions.T
    if not len(places):
        return None
    over = lengths[lengths > room] - room
    different, first, counts = np.unique(words, return_index=True, return_counts=True)
    # Lines of which there is another with the same words, and then with the same tokens.
    by_words, by_tokens = (int(n[n > 1].sum()) for n in (counts, np.unique(tokens, return_counts=True)[1]))
    return Captions(
        lines=len(lengths),
        most_lines=int(np.unique(places, return_counts=True)[1].max()),
        median_tokens=float(np.median(lengths)),
        cut=len(over),
        tokens_cut=int(over.sum()),
        longest=int(lengths.max()),
        longest_in=_first(pairs, places[lengths == lengths.max()])[0],
        repeated=by_words,
        repeated_nearly=by_tokens - by_words,
        most_repeated=[(int(counts[at]), _words(pairs[places[first[at]]], different[at])) for at in _largest(counts)],
    )


def _largest(counts: Places) -> list[int]:
    """Where the largest counts above 1 are, the first of equal ones first."""
    return [at for at in np.argsort(-counts, kind="stable")[:EXAMPLES].tolist() if counts[at] > 1]


def _words(pair: Pair, digest: int) -> str:
    with contextlib.suppress(BadSample):
        return next((text for text in pair.captions() if words_digest(text) == digest), "")
    return ""


def find_repeats(pairs: PairList, facts: Facts, held_out: Flags) -> tuple[Repeats, Leaks]:
    """Find equal and similar images, and what the held-out pairs share with the others.

    Args:
        pairs: N of them.
        facts: of all of them.
        held_out: (N,) bool, the pairs that training would hold out.
    """
    legible = np.flatnonzero(facts.pairs["sides"][:, 0])
    held = held_out[legible]
    _, content_of, counts = np.unique(facts.pairs["content"][legible], return_inverse=True, return_counts=True)
    leaking = legible[held & np.isin(content_of, content_of[~held])]
    places, _, tokens, _ = facts.captions.T
    captions = places[held_out[places] & np.isin(tokens, tokens[~held_out[places]])]
    near, near_leaks, twos = _near(facts.pairs["look"][legible], content_of, held)
    repeats = Repeats(
        equal=int(counts[counts > 1].sum()),
        equal_groups=[_first(pairs, legible[content_of == content]) for content in _largest(counts)],
        near=near,
        near_examples=[[shown(pairs.names[at]) for at in legible[two].tolist()] for two in twos],
    )
    leaks = Leaks(
        held_out=int(held_out.sum()),
        images=len(leaking),
        images_nearly=near_leaks,
        captions=len(np.unique(captions)),
        examples=_first(pairs, leaking),
    )
    return repeats, leaks


def _near(looks: Places, content_of: Places, held: Flags) -> tuple[int | None, int | None, list[list[int]]]:
    """How many images look like a different one, how many held-out ones like one of training, and some of them."""
    if perceptual_hash() is None:
        return None, None, []
    looks, first, look_of = np.unique(looks, return_index=True, return_inverse=True)
    trained = np.bincount(look_of[~held], minlength=len(looks)) > 0
    # Images of one look and different contents are similar by themselves.
    similar = np.bincount(np.unique(np.c_[look_of, content_of], axis=0)[:, 0], minlength=len(looks)) > 1
    leaking = similar & trained
    examples = []
    for look in np.flatnonzero(similar)[:EXAMPLES]:
        other = (look_of == look) & (content_of != content_of[first[look]])
        examples.append([first[look], other.argmax()])
    for one, other in near_pairs(looks.view(np.uint64)):
        similar[one] = similar[other] = True
        # Several places of one hash may be among them, so that |= on an index would keep the last alone.
        leaking[one[trained[other]]] = True
        leaking[other[trained[one]]] = True
        if len(examples) < EXAMPLES:
            # The same two come once for each piece that they share.
            examples += [two for two in np.c_[first[one], first[other]].tolist() if two not in examples]
    return int(similar[look_of].sum()), int(leaking[look_of[held]].sum()), examples[:EXAMPLES]


def near_pairs(hashes: NDArray[np.uint64], most: int = NEAR_BITS) -> Iterator[tuple[Places, Places]]:
    """Find the hashes that differ in at most ``most`` bits, without comparing all with all.

    Two numbers that differ in at most K bits agree in one of K + 1 pieces that both are cut into. So only those that
    share a piece are compared (multi-index hashing: Norouzi, Punjani, Fleet, CVPR 2012).

    Args:
        hashes: (U,) uint64, all different.
        most: K.

    Yields:
        Places (n,) and (n,) of two such hashes each. A pair can come more than once.
    """
    edges = np.linspace(0, 64, most + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        pieces = (hashes >> low) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(pieces, kind="stable")
        # Each with the next in order, then with the one after it, as long as they share the piece.
        first, step = np.arange(len(order)), 0
        while len(first):
            step += 1
            first = first[first + step < len(order)]
            one, other = order[first], order[first + step]
            shared = pieces[one] == pieces[other]
            first, one, other = first[shared], one[shared], other[shared]
            near = _count_bits(hashes[one] ^ hashes[other]) <= most
            yield one[near], other[near]


# Bits that are set in each 16-bit number.
_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)


def _count_bits(numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return _BITS[np.ascontiguousarray(numbers).view(np.uint16).reshape(*numbers.shape, 4)].sum(-1, dtype=np.uint8)


def _problems(report: Report, options: CheckOptions, val_pairs: int | None) -> Iterator[str]:
    if report.faults:
        yield f"{len(report.faults):,} faults, listed above."
    if not report.pairs:
        yield "There is no pair."
    elif val_pairs == 0:
        yield "There is no pair to validate on (--val_pairs)."
    elif report.pairs - report.leaks.held_out < 2:
        yield "There are fewer than 2 pairs to train on."
    if report.bad_pairs > options.max_bad * report.pairs:
        yield (
            f"{report.bad_pairs:,} of {report.pairs:,} pairs ({report.bad_pairs / report.pairs:.1%}) cannot be used, "
            f"more than --max_bad {options.max_bad:g}."
        )


def _array_problems(pairs: PairList, facts: Facts, floats: list[int], size: int, val_pairs: int) -> Iterator[str]:
    """Arrays of another size than the model's, and lists of both kinds of pixels."""
    if not pairs.num_cached and not any(map(is_npz, pairs.names)):
        return
    shorter = facts.pairs["sides"].min(axis=1)
    sizes = ((pairs[at].pixels, shorter[at]) for at in np.flatnonzero((shorter > 0) & (shorter != size)).tolist())
    if wrong := [(path, side) for path, side in sizes if is_npz(path)]:
        yield (
            f"{len(wrong):,} arrays are not of the model's {size} pixels, for instance {shown(wrong[0][0])} "
            f"({wrong[0][1]}); `train-clip data npz --image_size {size}` makes them anew."
        )
    in_validation = np.arange(len(pairs)) >= len(pairs) - val_pairs
    for part in (~in_validation, in_validation):
        normalised, legible = part[floats].sum(), (part & (shorter > 0)).sum()
        if 0 < normalised < legible:
            yield (
                f"{normalised:,} of {legible:,} images are arrays of already normalised pixels, the others pictures; "
                "expected one kind."
            )
