"""The report of a check: what is bad, fixed, truncated, repeated, or would be in both training and validation."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train_clip.data import crops, images
from train_clip.data.pairs import PairList, held_out_indices
from train_clip.data.scan import Scan
from train_clip.data_tools.facts import Facts, perceptual_hash, words_digest
from train_clip.errors import BadSample
from train_clip.options import PairOptions, at_least, option
from train_clip.printing import no_formula, printable

EXAMPLES = 5
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
NEAR_BITS = 4  # of 64; what recompression and resizing change in a pHash

Report = dict[str, Any]  # plain data, as --json writes it


@dataclass(frozen=True)
class CheckOptions(PairOptions):
    """What to check for, and where to write the report."""

    image_size: int = option(224, "side of the model's square input in pixels", at_least(1))
    context_length: int = option(77, "maximum number of tokens in a caption, including start and end", at_least(2))
    num_workers: int | None = option(None, "worker processes; default: one per core", at_least(0))
    cache: bool = option(True, "cache the results in the user's cache folder, and check only changed files again")
    json: Path | None = option(None, "file to write the report to")


def build_report(scan: Scan, facts: Facts, options: CheckOptions, val_pairs: int | None) -> Report:
    """Put the figures together; the last ``val_pairs`` of the pairs, if given, are validated on in place of a share."""
    pairs = scan.pairs
    held_out = np.zeros(len(pairs), bool)
    last = list(range(len(pairs) - (val_pairs or 0), len(pairs)))
    held_out[held_out_indices(pairs, options.val_share) if val_pairs is None else last] = True
    report = {
        "source": str(scan.source),  # folder or table
        "entries": scan.num_entries,  # files, or rows
        "pairs": len(pairs),
        "cached": pairs.num_cached,  # pairs that are read from npz/, in place of the image
        "lone_images": _listed(scan.lone_images),
        "lone_captions": _listed(scan.lone_captions),
        "others": dict(scan.others.most_common()),  # files that are neither image nor caption, by suffix
        "folder_links": _listed(scan.folder_links),
        "faults": scan.faults,
        **_notes(pairs, facts),
        "sizes": _sizes(facts.pairs["sides"], options.image_size),
        "captions": _captions(pairs, facts, options.context_length - 2),
        **find_repeats(pairs, facts, held_out),
    }
    return report | {"problems": list(_problems(report, pairs, facts, options, val_pairs))}


def _notes(pairs: PairList, facts: Facts) -> Report:
    bad: Report = defaultdict(list)
    mended: Report = defaultdict(list)
    bad_pairs, notes = 0, list(facts.notes)
    for place in np.flatnonzero(facts.pairs["note"]).tolist():
        pair = pairs[place]
        of_captions, of_image, *whats = notes[facts.pairs["note"][place]].split("\n")
        bad_pairs += bool(of_captions or of_image)
        bad[of_captions].append(pair.caption or pair.image)
        bad[of_image].append(pair.pixels)
        for what in whats:
            mended[what].append(pairs.names[place])
    bad.pop("", None)  # of what is not bad
    return {
        "bad_pairs": bad_pairs,
        "bad": {why: list(map(printable, sorted(paths))) for why, paths in sorted(bad.items())},
        "mended": {what: _listed(sorted(names)) for what, names in sorted(mended.items())},
    }


def _listed(names: list[str]) -> Report:
    return {"number": len(names), "examples": list(map(_shown, names[:EXAMPLES]))}


def _first(pairs: PairList, places: Any) -> list[str]:
    return list(map(_shown, sorted(pairs.names[at] for at in places)[:EXAMPLES]))


def _shown(name: str) -> str:
    return no_formula(printable(name), "./")


def _sizes(sides: np.ndarray, image_size: int) -> Report | None:
    sides = sides[sides[:, 0] > 0]
    if not len(sides):
        return None
    columns = np.c_[sides, sides.max(1) / sides.min(1)]
    width, height, aspect = np.quantile(columns, QUANTILES, axis=0, method="nearest").T.tolist()
    return {
        "width": list(map(int, width)),
        "height": list(map(int, height)),
        "aspect": [round(value, 3) for value in aspect],  # longer side over shorter side
        "enlarged": int((sides.min(1) < image_size).sum()),  # images whose shorter side is below the model's
    }


def _captions(pairs: PairList, facts: Facts, room: int) -> Report | None:
    places, words, tokens, lengths = facts.captions.T
    if not len(places):
        return None
    over = lengths[lengths > room] - room
    different, first, counts = np.unique(words, return_index=True, return_counts=True)
    by_words, by_tokens = (int(n[n > 1].sum()) for n in (counts, np.unique(tokens, return_counts=True)[1]))
    return {
        "lines": len(lengths),
        "most_lines": int(np.unique(places, return_counts=True)[1].max()),  # of one pair
        "median_tokens": float(np.median(lengths)),  # of a line, without start and end
        "cut": len(over),  # lines over the context
        "tokens_cut": int(over.sum()),
        "longest": int(lengths.max()),  # tokens of the longest line
        "longest_in": _first(pairs, places[lengths == lengths.max()])[0],  # its image
        "repeated": by_words,  # lines whose words stand in another line too
        "repeated_nearly": by_tokens - by_words,  # that differ from another only in what the tokenizer drops
        "most_repeated": [[int(counts[at]), _text(pairs[places[first[at]]], different[at])] for at in _largest(counts)],
    }


def _largest(counts: np.ndarray) -> list[int]:
    """Where the largest counts above 1 are, the first of equal ones first."""
    return [at for at in np.argsort(-counts, kind="stable")[:EXAMPLES].tolist() if counts[at] > 1]


def _text(pair: Any, digest: int) -> str:
    try:
        return next((no_formula(text) for text in pair.captions() if words_digest(text) == digest), "")
    except BadSample:
        return ""


def find_repeats(pairs: PairList, facts: Facts, held_out: np.ndarray) -> dict[str, Report]:
    """Find equal and similar images, and what the held-out pairs, flagged in (N,), share with the others."""
    legible = np.flatnonzero(facts.pairs["sides"][:, 0])
    held = held_out[legible]
    _, content_of, counts = np.unique(facts.pairs["content"][legible], return_inverse=True, return_counts=True)
    leaking = legible[held & np.isin(content_of, content_of[~held])]
    places, _, tokens, _ = facts.captions.T
    captions = places[held_out[places] & np.isin(tokens, tokens[~held_out[places]])]
    near, near_leaks, twos = _near(facts.pairs["look"][legible], content_of, held)
    repeats = {
        "equal": int(counts[counts > 1].sum()),  # images whose file is byte for byte that of another pair
        "equal_groups": [_first(pairs, legible[content_of == content]) for content in _largest(counts)],
        "near": near,  # images that look like a different one; None without the library
        "near_examples": [[_shown(pairs.names[at]) for at in legible[two].tolist()] for two in twos],
    }
    leaks = {
        "held_out": int(held_out.sum()),
        "images": len(leaking),  # held-out pairs whose image is byte for byte that of a training pair
        "images_nearly": near_leaks,  # whose image looks like that of a training pair; None without the library
        "captions": len(np.unique(captions)),  # of which a caption is, to the model, one of a training pair
        "examples": _first(pairs, leaking),
    }
    return {"repeats": repeats, "leaks": leaks}


def _near(looks: np.ndarray, content_of: np.ndarray, held: np.ndarray) -> tuple[Any, Any, list[Any]]:
    if perceptual_hash() is None:
        return None, None, []
    looks, first, look_of = np.unique(looks, return_index=True, return_inverse=True)
    # Images of one look and different contents are similar by themselves.
    different, at = np.unique(np.c_[look_of, content_of], axis=0, return_index=True)
    same = different[1:, 0] == different[:-1, 0]
    similar, trained = (np.isin(np.arange(len(looks)), some) for some in (different[1:][same, 0], look_of[~held]))
    leaking = similar & trained
    examples = np.c_[at[:-1], at[1:]][same][:EXAMPLES].tolist()
    for one, other in near_pairs(looks.view(np.uint64)):
        for each, like in ((one, other), (other, one)):
            similar[each] = True
            # Several places of one hash may be among them, so that |= on an index would keep the last alone.
            leaking[each[trained[like]]] = True
        if len(examples) < EXAMPLES:
            # The same two come once for each piece that they share.
            examples += [two for two in np.c_[first[one], first[other]].tolist() if two not in examples]
    return int(similar[look_of].sum()), int(leaking[look_of[held]].sum()), examples[:EXAMPLES]


def near_pairs(hashes: np.ndarray, most: int = NEAR_BITS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find which of (U,) different hashes differ in at most ``most`` bits; a pair of places may come more than once.

    Two numbers that differ in at most K bits agree in one of K + 1 pieces that both are cut into. So only those that
    share a piece are compared (multi-index hashing: Norouzi, Punjani, Fleet, CVPR 2012).
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
            differing = hashes[one] ^ hashes[other]
            for _ in range(most):
                differing &= differing - np.uint64(1)  # the lowest bit that is set is cleared
            near = differing == 0
            yield one[near], other[near]


def _problems(
    report: Report, pairs: PairList, facts: Facts, options: CheckOptions, val_pairs: int | None
) -> Iterator[str]:
    number, bad, size, most = len(pairs), report["bad_pairs"], options.image_size, options.max_bad
    if report["faults"]:
        yield f"{len(report['faults']):,} faults, listed above."
    if val_pairs == 0:
        yield "There are no validation pairs (--val_pairs)."
    elif number - report["leaks"]["held_out"] < 2:
        yield "There are fewer than 2 training pairs."
    if bad > most * number:
        yield f"{bad:,} of {number:,} pairs ({bad / number:.1%}) are unusable, more than --max_bad {most:g}."
    shorter = facts.pairs["sides"].min(axis=1)
    other = np.flatnonzero((shorter > 0) & (shorter != size)).tolist()
    if wrong := [place for place in other if images.is_npz(pairs[place].pixels)]:
        yield (
            f"{len(wrong):,} arrays do not have the model's {size} pixels, for instance "
            f"{pairs[wrong[0]].pixels} ({shorter[wrong[0]]}); `train-clip data npz --image_size {size}` writes "
            "them again."
        )
    normalized = np.array([crops.NORMALISED in note for note in facts.notes])[facts.pairs["note"]]
    for part in np.split(np.c_[normalized, shorter > 0], [number - (val_pairs or 0)]):
        arrays, legible = part.sum(axis=0)
        if 0 < arrays < legible:
            yield (
                f"{arrays:,} of {legible:,} images are arrays of already normalized pixels, the others are pictures; "
                "expected one kind."
            )
