"""Check every pair before training."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from train_clip import errors, files
from train_clip.data import scan, table
from train_clip.data_tools.facts import look_at
from train_clip.data_tools.report import CheckOptions, Report, build_report
from train_clip.printing import printable
from train_clip.shards.write import verify

NAMED = 1000  # files of one reason on the screen


def data_check(folder: Path | None = None, /, *, options: CheckOptions) -> Report:
    """Check every pair: what is bad, fixed, truncated, repeated, or would leak into validation.

    Args:
        folder: images and captions that share a stem; or give a table with --pairs
        options: what to check for

    Raises:
        UserError: training would not start, or would stop.
    """
    if options.json is not None:
        files.require_place(options.json)
    found = scan.scan_source(folder, options)
    sources, val_pairs = [found.source], None
    if options.val_pairs is not None:
        held_out = table.scan_table(options.val_pairs, options)
        found.pairs = found.pairs.followed_by(held_out.pairs)
        found.num_entries += held_out.num_entries
        found.lone_images += held_out.lone_images
        found.lone_captions += held_out.lone_captions
        found.faults += held_out.faults
        val_pairs = len(held_out.pairs)
        sources.append(held_out.source)
    if options.shards is not None:
        found.faults += verify(found.pairs)
    facts = look_at(found.pairs, sources, options.context_length, options.num_workers, options.cache)
    report = build_report(found, facts, options, val_pairs)
    if options.json is not None:
        files.write_text(options.json, json.dumps(report, indent=2) + "\n")
    print("\n".join(lines(report, options)))
    if report["problems"]:
        raise errors.UserError(f"{report['source']}: training would fail. {' '.join(report['problems'])}")
    return report


def lines(report: Report, options: CheckOptions) -> Iterator[str]:
    """The report in words."""
    kind = "rows" if Path(report["source"]).is_file() else "files"
    yield f"{report['source']}: {report['pairs']:,} pairs among {report['entries']:,} {kind}"
    if report["cached"]:
        yield f"  {report['cached']:,} × read from npz/ instead of the image"
    yield from _named("image without a caption", report["lone_images"])
    yield from _named("caption without an image", report["lone_captions"])
    if kind == "rows":
        yield from dict.fromkeys(
            f"   {text}" for text in map(scan.path_advice, report["lone_captions"]["examples"]) if text
        )
    yield from _named("link to a folder, not followed", report["folder_links"])
    if report["others"]:
        others = (f"{count:,} × {printable(suffix)}" for suffix, count in report["others"].items())
        yield f"  neither image nor caption: {', '.join(others)}.{scan.advice_on(report['others'])}"
    if report["faults"]:
        yield f"Faults: {len(report['faults']):,}. Training does not start with them."
        yield from ("  " + fault.replace("\n", "\n  ") for fault in report["faults"])
    if report["bad"]:
        share = report["bad_pairs"] / report["pairs"]
        yield f"Bad: {report['bad_pairs']:,} pairs ({share:.2%}). Training replaces them; --json lists all of them."
        yield from by_reason(report["bad"])
    if report["mended"]:
        yield "Fixed each time a file is read:"
        for what, found in report["mended"].items():
            yield from _named(what, found)
    yield from _sizes(report["sizes"], options.image_size)
    yield from _captions(report["captions"], options.context_length)
    yield from _repeats(report["repeats"])
    yield from _leaks(report["leaks"], options)


def by_reason(bad: Mapping[str, list[str]]) -> Iterator[str]:
    """Files under the reason why they are bad, as many as a screen may hold."""
    for reason, paths in sorted(bad.items()):
        yield f"  {len(paths):,} × {reason}"
        yield from (f"    {path}" for path in paths[:NAMED])
        if len(paths) > NAMED:
            yield f"    … and {len(paths) - NAMED:,} more"


def _named(what: str, found: Report) -> Iterator[str]:
    if found["number"]:
        yield f"  {found['number']:,} × {what}, for instance {', '.join(found['examples'])}"


def _sizes(sizes: Report | None, image_size: int) -> Iterator[str]:
    if sizes is None:
        return
    yield "Images           least      5%  median     95%    most"
    for name, key, form in (("width", "width", ",d"), ("height", "height", ",d"), ("aspect ratio", "aspect", ".2f")):
        yield f"  {name:12}" + "".join(f"{value:8{form}}" for value in sizes[key])
    if sizes["enlarged"]:
        yield f"  {sizes['enlarged']:,} are smaller than the model's {image_size} pixels and would be enlarged"


def _captions(captions: Report | None, context_length: int) -> Iterator[str]:
    if captions is None:
        return
    yield (
        f"Captions: {captions['lines']:,} lines, up to {captions['most_lines']:,} an image; "
        f"{captions['median_tokens']:g} tokens in the median caption, {captions['longest']:,} at most "
        f"({captions['longest_in']})"
    )
    cut, repeated, number = captions["cut"], captions["repeated"], captions["lines"]
    if cut:
        yield (
            f"  {cut:,} ({cut / number:.1%}) are longer than {context_length} tokens including start and end: they "
            f"lose {captions['tokens_cut']:,} tokens, {captions['tokens_cut'] / cut:.1f} each"
        )
    if repeated:
        yield f"  {repeated:,} ({repeated / number:.1%}) repeat another caption"
        yield from (f"    {count:,} × {text}" for count, text in captions["most_repeated"])
    if nearly := captions["repeated_nearly"]:
        yield (
            f"  {nearly:,} more give the same tokens as another: they differ only in what the tokenizer ignores (case, "
            "blanks) or cuts"
        )


def _repeats(repeats: Report) -> Iterator[str]:
    if repeats["equal"]:
        yield f"Repeated images: {repeats['equal']:,} are in several pairs, byte for byte"
        yield from (f"    {' = '.join(group)}" for group in repeats["equal_groups"])
    if repeats["near"] is None:
        yield "Similar images were not searched: pip install ImageHash"
    elif repeats["near"]:
        yield f"Similar images: {repeats['near']:,} look like a different one (perceptual hash, which ignores color)"
        yield from (f"    {' ~ '.join(two)}" for two in repeats["near_examples"])


def _leaks(leaks: Report, options: CheckOptions) -> Iterator[str]:
    if leaks["held_out"]:
        by = f"--val_share {options.val_share:g}" if options.val_pairs is None else "--val_pairs"
        similar = "" if leaks["images_nearly"] is None else f", {leaks['images_nearly']:,} by a similar image"
        yield (
            f"Held out by {by}: {leaks['held_out']:,} pairs. Of these, also in training: {leaks['images']:,} by the "
            f"same image{similar}, {leaks['captions']:,} by a caption"
        )
    if leaks["images"]:
        yield f"  for instance {', '.join(leaks['examples'])}. `train-clip data split` keeps equal images on one side"
