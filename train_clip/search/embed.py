"""Embed the images or captions of a folder or a table into a file, in one process or several.

Rows are embedded in parts: files beside the output, complete or absent, named by a digest of all that decides what they
hold. Those that a killed command has left are used again, and in the end all are joined.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader

from train_clip.checkpoints.found import NO_CHOICE, find_weights, fingerprint
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.evaluate import load_for_scoring
from train_clip.commands.progress import with_progress
from train_clip.cores import free_cores
from train_clip.data.pairs import IN_TABLE, Pair, PairList, plain_name
from train_clip.data.scan import scan_source
from train_clip.errors import BadSample, UserError, first_line
from train_clip.estimates import require_room, size
from train_clip.evaluation.embed import require_finite
from train_clip.evaluation.encode import WINDOW, batches
from train_clip.files import LOCK, held, replacing, require_new, require_no_others, sweep
from train_clip.models.clip import unit_norm
from train_clip.options import WeightOptions, at_least, option
from train_clip.printing import printable
from train_clip.probes.images import ImageOptions, find_images
from train_clip.probes.rows import require_format
from train_clip.search import vectors
from train_clip.shards.members import stamp_of

LEAST_ROWS = 1024  # of a part
NAMED = 20  # files in a message
TEXT_BYTES = 200  # about what a row's key, path and caption take
PATIENCE = timedelta(days=365)  # with processes that have more to do


@dataclass(frozen=True)
class EmbedOptions(ImageOptions):
    """What to embed, and where to write it."""

    output: Path = option(Path("embeddings.parquet"), "file to write: .parquet, .npz or .npy")
    what: Literal["images", "captions"] = option("images", "what to embed: every image, or every caption")
    dtype: Literal["float32", "float16"] = option("float32", "precision of the embeddings")
    num_workers: int | None = option(None, "threads that decode images; default: one per core", at_least(0))


def embed(checkpoint: str, /, options: EmbedOptions, weights: WeightOptions = NO_CHOICE) -> Path:
    """Embed the images or captions of a folder or table into a file; after a kill, the same command continues.

    Args:
        checkpoint: a checkpoint or a run's folder (its best checkpoint), or weights of OpenAI (ViT-B/32), open_clip or
            Hugging Face: a file, a folder, or hf-hub:NAME
        options: what to embed, and where to write it
        weights: values that they do not state
    """
    output = options.output
    require_format(output, vectors.FORMATS, vectors.WHAT)
    folder = output.with_name(f"{output.name}.parts")
    if options.folder and output.suffix == ".npz" and output.resolve().is_relative_to(options.folder.resolve()):
        raise UserError(
            f"{output}: lies in {options.folder}/, whose arrays are taken for images. Give another --output."
        )
    if not folder.exists():
        require_new(*vectors.files_of(output))
    with together() as (rank, processes):
        found = find_weights(checkpoint, weights, options.backbone)
        model, rows = load_for_scoring(found, options.device), find_rows(options)
        about = describe(model, rows, options) | {"checkpoint": absolute(found.source)}
        given = {**vars(weights), "backbone": options.backbone}
        about["weights"] = {name: absolute(value) for name, value in given.items() if value is not None}
        parts = find_parts(rows, about, folder, options)
        about["content"] = hashlib.sha256(json.dumps([part.name for part in parts.values()]).encode()).hexdigest()
        if rank == 0:
            prepare(parts, about, folder, options)
        with held(folder) if rank == 0 else nullcontext():
            if rank == 0:
                sweep(folder)
            wait(processes)  # for the folder
            own = list(parts.items())[rank::processes]
            write_parts(model, rows, {some: part for some, part in own if not part.exists()}, options, processes)
            wait(processes)  # for the other parts
            if rank == 0:
                join(rows, parts, about, folder, options)
                # While it is held: another command that takes it next has parts there.
                shutil.rmtree(folder, ignore_errors=True)
        if rank == 0:
            with suppress(OSError):  # where a file that is open cannot be removed, or stays under another name
                if sys.platform == "win32":
                    (folder / LOCK).unlink()
                folder.rmdir()
    return output


class Rows(NamedTuple):
    """What is embedded: a pair for each row, of an image, or of one of its captions."""

    pairs: PairList
    root: str  # that names are relative to
    lost: list[BadSample]  # captions that cannot be read


def find_rows(options: EmbedOptions) -> Rows:
    """Every image of the source, or every caption, in the order of the images' names."""
    lost = list[BadSample]()
    if options.what == "images":
        return Rows(*find_images(options), lost)
    pairs = scan_source(options.folder, options).require_pairs().pairs
    texts = ((pair.image, f"{IN_TABLE}{text}") for pair in pairs for text in captions_of(pair, lost))
    if not (found := PairList("", *zip(*texts, strict=True))):
        raise UserError(f"{lost[0]}; none of the {len(lost):,} files of captions can be read.")
    return Rows(found, pairs.root, lost)


def captions_of(pair: Pair, lost: list[BadSample]) -> list[str]:
    """The captions of a pair; none where they cannot be read, which is noted."""
    try:
        return pair.captions()
    except BadSample as bad:
        lost.append(bad)
        return []


def describe(model: Pretrained, rows: Rows, options: EmbedOptions) -> vectors.About:
    """What the file says of itself, see ``Vectors``."""
    return {
        "version": vectors.VERSION,
        "model": model.model.name,
        "fingerprint": fingerprint(model.model),
        "dim": model.model.embed_dim,
        "dtype": options.dtype,
        "normalized": True,
        "kind": options.what.removesuffix("s"),
        "source": absolute(options.folder or options.pairs),
        "root": str(Path(rows.root).absolute()),
        "device": model.model.logit_scale.device.type,
    }


def absolute(name: Any) -> Any:
    """A path, if there is something at it, from the root; else the name or number as it is."""
    is_path = isinstance(name, str | Path) and Path(name).exists()
    return str(Path(name).absolute()) if is_path else name


def find_parts(rows: Rows, about: vectors.About, folder: Path, options: EmbedOptions) -> dict[range, Path]:
    """The rows of each part, and its file: whole windows, as captions are sorted by their lengths within one."""
    decides = [about[name] for name in ("version", "fingerprint", "dtype", "kind", "device")]
    settings, number, window = json.dumps([*decides, options.batch_size]), len(rows.pairs), WINDOW * options.batch_size
    most = -(-LEAST_ROWS // window) * window

    def digest(some: range) -> str:
        digest = hashlib.sha256(settings.encode())
        for pair in map(rows.pairs.__getitem__, some):
            state = stamp_of(pair.pixels) if options.what == "images" else pair.texts
            digest.update(json.dumps([pair.pixels, state]).encode())
        return digest.hexdigest()

    parts = (range(first, min(first + most, number)) for first in range(0, number, most))
    return {some: folder / f"{digest(some)}.part" for some in parts}


def prepare(parts: dict[range, Path], about: vectors.About, folder: Path, options: EmbedOptions) -> None:
    """Refuse to begin where the output cannot be written, and say what it takes."""
    output = options.output
    if output.exists() and vectors.open_vectors(output).about.get("content") != about["content"]:
        require_new(output)
    require_no_others(folder, "*.part", *(file.name for file in vectors.files_of(output)))
    there = {*folder.glob("*.part")}
    done, number = sum(len(some) for some, part in parts.items() if part in there), sum(map(len, parts))
    row = about["dim"] * np.dtype(about["dtype"]).itemsize + TEXT_BYTES
    free = require_room(folder, (2 * number - done) * row, "embeddings and their parts take until they are joined")
    print(
        f"{number:,} {options.what} by {about['model']} ({about['checkpoint']}) take {size(number * row)}, and twice "
        f"that until they are joined; {size(free)} are free. Memory hardly grows with their number. If stopped, "
        "the same command continues."
    )
    folder.mkdir(parents=True, exist_ok=True)
    if there:
        unused = len(there - {*parts.values()})
        print(f"Embedded already: {done:,}. Parts of other images, another model or other options: {unused:,}.")


def write_parts(model: Pretrained, rows: Rows, parts: dict[range, Path], options: EmbedOptions, processes: int) -> None:
    """Embed the rows of parts, batches running on from part to part, and write each."""
    numbers = [row for some in parts for row in some]
    several = map(rows.pairs.__getitem__, numbers)
    items = (Path(pair.pixels) if options.what == "images" else pair.texts[0] for pair in several)
    num_workers = free_cores(processes) if options.num_workers is None else options.num_workers
    found = batches(model.model, model.tokens, items, options.batch_size, num_workers, in_half=False)
    loader: Any = DataLoader(numbers, options.batch_size, collate_fn=list)  # type: ignore[arg-type]
    counted = zip(with_progress(loader, options.what), found, strict=False)
    for some, part in parts.items():
        embedded = [batch for _, batch in islice(counted, -(-len(some) // options.batch_size))]
        why = {bad.path: bad.reason for _, unreadable in embedded for bad in unreadable}
        names = [rows.pairs[row].pixels for row in some]
        embeddings = unit_norm(torch.cat([one for one, _ in embedded])).cpu()
        good = [place for place, name in enumerate(names) if name not in why]
        require_finite(embeddings[good], [names[place] for place in good], options.what)
        reasons = np.array([why.get(name, "") for name in names])
        with replacing(part) as beside, beside.open("wb") as file:
            np.savez(file, embeddings=embeddings.numpy().astype(options.dtype), reasons=reasons)


def join(rows: Rows, parts: dict[range, Path], about: vectors.About, folder: Path, options: EmbedOptions) -> None:
    """Write the rows of all parts to one file, move it to its place, and say what is in it and what is not."""
    pairs, reasons = rows.pairs, dict[int, str]()
    for some, part in parts.items():
        with vectors.reading(part), np.load(part) as file:
            reasons |= {row: why for row, why in zip(some, file["reasons"].tolist(), strict=True) if why}
    bad = [BadSample(pairs[row].pixels, why) for row, why in reasons.items()]
    if len(bad) == len(pairs):
        raise UserError(f"{bad[0]}; none of the {len(pairs):,} images can be read.")
    about["number"] = len(pairs) - len(bad)
    with vectors.writer(folder / options.output.name, about) as append:
        for some, part in parts.items():
            kept = [place for place, row in enumerate(some) if row not in reasons]
            several = [pairs[some[place]] for place in kept]
            names = [pair.image.removeprefix(rows.root) for pair in several]
            captions = [(captions_of(pair, rows.lost) or [""])[0] for pair in several]
            with vectors.reading(part), np.load(part) as file:
                embeddings = file["embeddings"]
            keys, paths = [printable(plain_name(name)) for name in names], [*map(printable, names)]
            append(embeddings[kept], keys, paths, captions)
    for file in reversed(vectors.files_of(options.output)):
        (folder / file.name).replace(file)
    print(f"{options.output}: {about['number']:,} embeddings, {about['dim']:,} {about['dtype']} numbers each.")
    for what, faults in ("Images that cannot be read", bad), ("Captions that cannot be read", rows.lost):
        if faults:
            named = [f"  {printable(str(one))}" for one in faults[:NAMED]] + ["  …"] * (len(faults) > NAMED)
            print(f"{what}: {len(faults):,}.", *named, sep="\n")


@contextmanager
def together() -> Iterator[tuple[int, int]]:
    """The rank of this process and their number, as ``torchrun`` starts them; each takes a GPU, where there are any."""
    rank, processes, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if processes < 2:
        yield 0, 1
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        distributed.init_process_group("gloo")
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {processes}; {first_line(error)}. Start several processes by torchrun."
        ) from error
    try:
        yield rank, processes
    finally:
        distributed.destroy_process_group()


def wait(processes: int) -> None:
    """Wait until all processes are here."""
    if processes > 1:
        try:
            distributed.monitored_barrier(timeout=PATIENCE)
        except RuntimeError as error:
            raise UserError(
                f"Another process has stopped ({first_line(error)}). Expected all to end together. What is embedded is "
                "kept: run the same command again."
            ) from error
