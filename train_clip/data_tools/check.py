"""Look at every pair before training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train_clip.commands.options import TableOptions, require_least
from train_clip.commands.progress import with_progress
from train_clip.data.pairs import PairList
from train_clip.data.samples import available_cores
from train_clip.data.scan import Scan, scan_source
from train_clip.data.split import require_share
from train_clip.data.table import scan_table
from train_clip.data_tools.facts import BATCH, AuditStore, audit_loader, cache_folder, is_damage
from train_clip.data_tools.report import Captions, Expectations, Leaks, Listed, Repeats, Report, Sizes, build_report
from train_clip.errors import UserError
from train_clip.files import require_place, write_text

NAMED = 1000  # files of one reason on the screen; --json names all
KEPT_EVERY = 64  # batches of a scan that an interruption may lose


@dataclass(frozen=True)
class CheckOptions(TableOptions):
    """What the pairs are held against, and where the report goes.

    Args:
        image_size: side of the model's square in pixels
        context_length: tokens of a caption at most, start and end included
        val_share: the share of the pairs that training would hold out
        val_pairs: a table of pairs to validate on, in place of --val_share
        max_bad: the share of the pairs that may be unreadable
        num_workers: processes that read, if not one a core
        cache: whether to keep what is found in the user's cache folder, and to look again only at files that changed
        json: a file to write the report to
    """

    image_size: int = 224
    context_length: int = 77
    val_share: float = 0.05
    max_bad: float = 0.01
    val_pairs: Path | None = None
    num_workers: int | None = None
    cache: bool = True
    json: Path | None = None


def data_check(folder: Path | None = None, /, *, options: CheckOptions) -> Report:
    """Look at every pair: what is bad, mended, cut, repeated, or would leak into validation.

    Args:
        folder: images and captions that share a stem; --pairs gives a table in its place
        options: what they are held against.

    Returns:
        The report, which is printed too.

    Raises:
        UserError: training would not begin, or would stop.
    """
    _require_sense(options)
    scan = scan_source(folder, options.source)
    held_out = None if options.val_pairs is None else scan_table(options.val_pairs, options.source)
    sources = [scan.source] if held_out is None else [scan.source, held_out.source]
    if held_out is not None:
        scan = scan.followed_by(held_out)
    expected = Expectations(
        options.image_size,
        options.context_length,
        options.val_share,
        options.max_bad,
        None if held_out is None else len(held_out.pairs),
    )
    report = look_and_report(scan, sources, expected, options)
    print("\n".join(lines(report, expected)))
    if options.json is not None:
        write_text(options.json, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    if report.problems:
        raise UserError(f"{report.source}: training would fail. " + " ".join(report.problems))
    return report


def look_and_report(scan: Scan, sources: list[Path], expected: Expectations, options: CheckOptions) -> Report:
    """Look at all pairs and put the figures together, in memory where nothing is to be kept or nothing can be."""
    workers = available_cores() if options.num_workers is None else options.num_workers
    if options.cache:
        store = None
        try:
            with contextlib.closing(AuditStore(sources, cache_folder())) as store:
                look_at(scan.pairs, store, workers)
                return build_report(scan, store, expected)
        except (OSError, sqlite3.Error) as error:
            if store is not None and store.file is not None and is_damage(error):
                store.file.unlink(missing_ok=True)
            print(f"What is found cannot be kept in the cache folder ({error}); going on without.")
    with contextlib.closing(AuditStore(sources, None)) as store:
        look_at(scan.pairs, store, workers)
        return build_report(scan, store, expected)


def _require_sense(options: CheckOptions) -> None:
    """Refuse numbers that cannot be, and a report that has no place."""
    require_share("val_share", options.val_share)
    if not 0 <= options.max_bad <= 1:
        raise UserError(f"--max_bad {options.max_bad}: expected a share from 0 to 1.")
    require_least(
        image_size=(options.image_size, 1),
        context_length=(options.context_length, 2),
        num_workers=(options.num_workers or 0, 0),
    )
    if options.json is not None:
        require_place(options.json)


def look_at(pairs: PairList, store: AuditStore, num_workers: int) -> None:
    """Fill the store with the facts of all pairs, keeping them on the way."""
    places = store.unknown(pairs)
    if len(places) < len(pairs):
        print(f"{len(pairs) - len(places):,} of {len(pairs):,} pairs have not changed since the last look.")
    loader = audit_loader(pairs, places, num_workers)
    waiting = []
    for number, facts in enumerate(with_progress(loader, f"batches of {BATCH} pairs"), 1):
        waiting += facts
        if number % KEPT_EVERY == 0:
            store.add(pairs, waiting)
            waiting = []
    store.add(pairs, waiting)


def lines(report: Report, expected: Expectations) -> Iterator[str]:
    """The report in words."""
    table = Path(report.source).is_file()
    yield f"{report.source}: {report.pairs:,} pairs among {report.entries:,} {'rows' if table else 'files'}"
    if report.cached:
        yield f"  {report.cached:,} × read from npz/, in place of the image"
    yield from _named("image without a caption", report.lone_images)
    yield from _named("caption without an image", report.lone_captions)
    yield from _named("link to a folder, not followed", report.folder_links)
    if report.others:
        counts = sorted(report.others.items(), key=lambda item: (-item[1], item[0]))
        yield "  neither image nor caption: " + ", ".join(f"{count:,} × {suffix}" for suffix, count in counts)
    if report.faults:
        yield f"Faults: {len(report.faults):,}. No run begins with them."
        yield from ("  " + fault.replace("\n", "\n  ") for fault in report.faults)
    yield from _bad(report)
    if report.mended:
        yield "Mended at each reading:"
        for what, found in report.mended.items():
            yield f"  {found.number:,} × {what}, for instance {found.examples[0]}"
    if report.sizes is not None:
        yield from _sizes(report.sizes, expected.image_size)
    if report.captions is not None:
        yield from _captions(report.captions, expected.context_length)
    yield from _repeats(report.repeats)
    yield from _leaks(report.leaks, expected)


def _named(what: str, found: Listed) -> Iterator[str]:
    if found.number:
        more = ", …" if found.number > len(found.examples) else ""
        yield f"  {found.number:,} × {what}: {', '.join(found.examples)}{more}"


def _bad(report: Report) -> Iterator[str]:
    if not report.bad:
        return
    yield f"Bad: {report.bad_pairs:,} pairs ({report.bad_pairs / report.pairs:.2%}). Training draws others for them."
    for reason, paths in report.bad.items():
        yield f"  {len(paths):,} × {reason}"
        yield from (f"    {path}" for path in paths[:NAMED])
        if len(paths) > NAMED:
            yield f"    … and {len(paths) - NAMED:,} more; --json names all"


def _sizes(sizes: Sizes, image_size: int) -> Iterator[str]:
    yield "Images         least     5%  median    95%   most"
    for name, values, form in (
        ("width", sizes.width, ",d"),
        ("height", sizes.height, ",d"),
        ("long / short", sizes.aspect, ".2f"),
    ):
        least, low, median, high, most = (format(value, form) for value in values)
        yield f"  {name:12} {least:>6} {low:>6} {median:>7} {high:>6} {most:>6}"
    if sizes.enlarged:
        yield f"  {sizes.enlarged:,} are smaller than the model's {image_size} pixels and would be enlarged"


def _captions(captions: Captions, context_length: int) -> Iterator[str]:
    yield (
        f"Captions: {captions.lines:,} lines, up to {captions.most_lines:,} an image; {captions.median_tokens:g} "
        f"tokens in the median, {captions.longest:,} at most ({captions.longest_in})"
    )
    if captions.cut:
        yield (
            f"  {captions.cut:,} ({captions.cut / captions.lines:.1%}) are over {context_length} tokens with start and "
            f"end: they lose {captions.tokens_cut:,} tokens, {captions.tokens_cut / captions.cut:.1f} each"
        )
    if captions.repeated:
        yield f"  {captions.repeated:,} ({captions.repeated / captions.lines:.1%}) say what another line says too"
        yield from (f"    {count:,} × {text}" for count, text in captions.most_repeated)
    if captions.repeated_nearly:
        yield f"  {captions.repeated_nearly:,} more differ from another only in what the tokenizer drops (case, blanks)"


def _repeats(repeats: Repeats) -> Iterator[str]:
    if repeats.equal:
        yield f"Repeated images: {repeats.equal:,} are byte for byte in several pairs"
        yield from (f"    {' = '.join(group)}" for group in repeats.equal_groups)
    if repeats.near is None:
        yield "Similar images were not looked for: pip install ImageHash"
    elif repeats.near:
        yield f"Similar images: {repeats.near:,} look like a different one (perceptual hash, which sees no colour)"
        yield from (f"    {' ~ '.join(two)}" for two in repeats.near_examples)


def _leaks(leaks: Leaks, expected: Expectations) -> Iterator[str]:
    if not leaks.held_out:
        return
    by = f"--val_share {expected.val_share:g}" if expected.val_pairs is None else "--val_pairs"
    yield (
        f"Held out by {by}: {leaks.held_out:,} pairs. Of them in training too: {leaks.images:,} "
        "by the same image"
        + ("" if leaks.images_nearly is None else f", {leaks.images_nearly:,} by a similar image")
        + f", {leaks.captions:,} by a caption"
    )
    if leaks.images:
        yield f"  for instance {', '.join(leaks.examples)}. `train-clip data split` keeps equal images on one side"
