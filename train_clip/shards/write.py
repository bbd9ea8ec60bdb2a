"""Write pairs into WebDataset shards with their indices, each complete or absent; check what is written."""

import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train_clip.commands.progress import in_workers
from train_clip.data.images import MAX_BYTES, reading
from train_clip.data.pairs import Pair, PairList
from train_clip.data.scan import scan_source
from train_clip.errors import BadSample, UserError
from train_clip.files import IN_TAR, opened, replacing, require_no_others, write_text
from train_clip.options import SourceOptions, at_least, option
from train_clip.printing import printable
from train_clip.shards.find import LIST
from train_clip.shards.members import (
    INDEX,
    TAR,
    index_of,
    index_text,
    parse_index,
    read_bytes,
    read_headers,
    split_path,
    stamp_of,
)

NAMED = 20  # pairs in a message
BLOCK = 2**24  # bytes that are read at a time


@dataclass(frozen=True)
class ShardOptions(SourceOptions):
    """How to write shards."""

    output: Path = option(Path("shards"), "folder for 00000.tar, 00001.tar, … and their indices")
    pairs_per_shard: int = option(1000, "pairs in a shard", at_least(1))
    num_workers: int | None = option(None, "processes that write; default: one per core", at_least(0))


def data_shards(folder: Path | None = None, /, *, options: ShardOptions) -> list[str]:
    """Write pairs into shards for `--shards`, files as they are; after a kill, the same command continues.

    Args:
        folder: images and captions that share a stem; or give a table with --pairs
        options: how

    Returns:
        The paths of the shards.
    """
    require_no_others(options.output, f"*{TAR}", f"*{TAR}{INDEX}", LIST)
    pairs = scan_source(folder, options).require_pairs().pairs
    step, number = options.pairs_per_shard, len(pairs)
    parts = [range(first, min(first + step, number)) for first in range(0, number, step)]
    shards = [str(options.output / f"{place:05}{TAR}") for place in range(len(parts))]
    if others := sorted({str(one) for one in options.output.glob(f"*{TAR}")} - {*shards}):
        raise UserError(f"{others[0]}: is none of these {len(shards):,} shards. Give another --output, or remove it.")
    options.output.mkdir(parents=True, exist_ok=True)
    lost, several = list[str](), list[dict[str, object]]()
    written = in_workers(partial(write_shard, pairs), [*zip(shards, parts, strict=True)], options.num_workers, "shards")
    for shard, (size, sha256, kept, bad) in zip(shards, written, strict=True):
        lost += bad
        several.append({"url": Path(shard).name, "nsamples": kept, "filesize": size, "sha256": sha256})
    # As WebDataset's wids has it.
    told = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": several}
    write_text(options.output / LIST, json.dumps(told, indent=1) + "\n")
    print(f"{options.output}: {number - len(lost):,} pairs in {len(shards):,} shards.")
    if lost:
        named = [f"  {printable(one)}" for one in lost[:NAMED]] + ["  …"] * (len(lost) > NAMED)
        print(f"Left out, as they cannot be read: {len(lost):,}.", *named, sep="\n")
    print(f"Next: train-clip train --shards {options.output}")
    return shards


def write_shard(pairs: PairList, part: tuple[str, range]) -> tuple[int, str, int, list[str]]:
    """Write the pairs of a range, unless they are there: the shard's bytes, SHA-256, its pairs, and what is unreadable.

    The same pairs give the same bytes.
    """
    shard, places = part
    file, lost, keys = Path(shard), list[str](), set[str]()
    stamp = _stamp(pairs, places)
    index = Path(f"{shard}{INDEX}")
    if file.is_file() and index.is_file():
        kept = parse_index(str(index), index.read_bytes())
        if (kept.stamp, kept.size) == (stamp, file.stat().st_size):
            return kept.size, kept.sha256, len(kept.names) // 2, kept.lost
    index.unlink(missing_ok=True)
    with replacing(file) as beside:
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
            for place in places:
                try:
                    image, captions = _contents(pairs[place])
                except BadSample as bad:
                    lost.append(str(bad))
                    continue
                key = _key(pairs.names[place], keys, place)
                for suffix, content in ((Path(pairs[place].pixels).suffix.lower(), image), (".txt", captions)):
                    member = tarfile.TarInfo(key + suffix)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        with beside.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        size = beside.stat().st_size
        members, _ = read_headers(str(beside), size)
    write_text(index, index_text(members, size=size, sha256=sha256, stamp=stamp, lost=lost))
    return size, sha256, len(members) // 2, lost


def verify(pairs: PairList) -> list[str]:
    """The shards of pairs whose bytes are not those of their index, a fault each; those without a SHA-256 pass."""
    shards = sorted({split_path(pairs.root + name)[0] for name in pairs.names})
    return [fault for fault in in_workers(_fault, shards, None, "shards") if fault]


def _fault(shard: str) -> str:
    digest = hashlib.sha256()
    try:
        index = index_of(shard)
        for start in range(0, index.size if index.sha256 else 0, BLOCK):
            digest.update(read_bytes(shard, start, min(start + BLOCK, index.size)))
    except UserError as error:
        return str(error)
    differs = index.sha256 not in ("", digest.hexdigest())
    return f"{printable(shard)}: its SHA-256 is not that of its index. Copy it again." * differs


def _contents(pair: Pair) -> tuple[bytes, bytes]:
    captions = "\n".join(pair.captions()).encode()
    with reading(pair.pixels, "image"), opened(pair.pixels) as file:
        if len(image := file.read(MAX_BYTES + 1)) > MAX_BYTES:
            raise BadSample(pair.pixels, f"image file over {MAX_BYTES:,} bytes")
    return image, captions


def _key(name: str, keys: set[str], place: int) -> str:
    """What a pair's files are called, without a dot in the last part, and differently from all others in a shard."""
    folder, base = os.path.split(re.sub(r"^[/.]+|\.\./|" + re.escape(IN_TAR), "", name))
    key = os.path.join(folder, base.rpartition(".")[0].replace(".", "_") or str(place))  # noqa: PTH118
    while key in keys:
        key = f"{key}-{place}"
    keys.add(key)
    return key


def _stamp(pairs: PairList, places: range) -> str:
    """What changes when any of the pairs does."""
    digest = hashlib.sha256()
    for pair in map(pairs.__getitem__, places):
        states = [stamp_of(path) for path in (pair.pixels, pair.caption) if path]
        digest.update(json.dumps([pair.image, pair.texts, states]).encode())
    return digest.hexdigest()
