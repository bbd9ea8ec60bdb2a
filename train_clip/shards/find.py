"""``--shards``: tars by paths, globs, braces and addresses → their pairs, as WebDataset groups the files in them."""

import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from train_clip.data.images import ARRAY_SUFFIX, image_suffixes
from train_clip.data.pairs import plain_name
from train_clip.data.scan import CAPTION_SUFFIX, Scan
from train_clip.errors import MissingFile, UsageError, UserError, first_line
from train_clip.optional import optional
from train_clip.options import SourceOptions
from train_clip.printing import printable
from train_clip.shards.members import TAR, Index, file_system, index_of, read_bytes
from train_clip.shards.pairs import ShardPairs

BETWEEN = "::"  # sources, as in open_clip and WebDataset
LIST = "index.json"  # of the shards in a folder, as WebDataset's wids has it
AT_ONCE = 16  # shards that are looked up


class Source(NamedTuple):
    """Shards that belong together."""

    shards: list[str]
    weight: float


def scan_shards(source: Path, options: SourceOptions) -> Scan:
    """Pair the images and captions of all shards that ``options.shards`` names; faults are of shards and of names.

    A pair's files share a key: their path up to the first dot of the name.

    Raises:
        UserError: no such shards.
    """
    sources = [find_source(text) for text in str(options.shards).split(BETWEEN)]
    scan = Scan(source, 0, ShardPairs("", [], [], [], []), [], [], pair_by="shards")
    several = [shard for one in sources for shard in one.shards]
    root = os.path.join(posixpath.commonpath(several) if len(several) > 1 else posixpath.dirname(several[0]), "")  # noqa: PTH118
    root = re.sub(r"^(\w+):/(?!/)", r"\1://", root) if len(sources) == 1 else ""
    names, captions, of = list[str](), list[str](), list[int]()
    for place, one in enumerate(sources):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for shard, found in zip(one.shards, pool.map(_index_or_fault, one.shards), strict=True):
                if isinstance(found, str):
                    scan.faults.append(found)
                    continue
                pairs = sorted(_pairs(scan, shard, found))
                for own, several_names in zip((names, captions), zip(*pairs, strict=True), strict=False):
                    own += [f"{shard}!{name}".removeprefix(root) for name in several_names]
                of += [place] * len(pairs)
    scan.pairs = ShardPairs(root, names, captions, of, [one.weight for one in sources])
    return scan


def find_source(text: str) -> Source:
    """SPEC or SPEC@WEIGHT → its shards: a tar, a folder, a glob, or any of them with {braces}, local or an address."""
    spec, _, number = text.rpartition("@") if re.search(r"@[0-9.]+$", text) else (text, "", "1")
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise UsageError(f"--shards {text}: the weight is {number}; expected a number above 0.")
    shards = [shard for one in _expanded(spec) for shard in _found(one)]
    if not shards:
        raise MissingFile(
            f"--shards {spec}: there are no such tars. Expected a tar, a folder of tars, a glob or braces."
        )
    if twice := [shard for shard, times in Counter(shards).items() if times > 1]:
        raise UsageError(f"--shards {spec}: names {twice[0]} more than once. Expected each shard once; see @WEIGHT.")
    return Source(shards, weight)


def _expanded(spec: str) -> list[str]:
    if "{" not in spec:
        return [spec]
    return list(optional("braceexpand", "--shards with braces", "use a glob (*.tar)").braceexpand(spec))


def _found(spec: str) -> list[str]:
    system, name = file_system(spec)
    if not spec.endswith(TAR):
        if re.search(r"\.(tar\.\w+|tgz)$", spec):
            raise UserError(f"{spec}: is compressed; its files cannot be found by where they lie. Uncompress it.")
        spec, name = posixpath.join(spec, f"*{TAR}"), posixpath.join(name, f"*{TAR}")
    elif not re.search(r"[*?\[]", spec):
        return [spec]
    try:
        found = sorted(str(one) for one in system.glob(name))
    except Exception as error:  # of any library below fsspec
        raise UserError(f"{spec}: cannot be listed ({type(error).__name__}: {first_line(error)}).") from error
    folder = spec.rpartition("/")[0]
    if re.search(r"[*?\[]", folder):
        before = spec.partition("://")[0] + "://" if "://" in spec else ""
        return [one if "://" in one else before + one for one in found] if before else found
    shards = [posixpath.join(folder, posixpath.basename(one)) for one in found]
    return [*shards, *(one for one in _listed(folder) if one not in shards and _matches(one, spec))]


def _listed(folder: str) -> Iterator[str]:
    """The shards that the list in a folder names: one that has vanished is missed."""
    path = posixpath.join(folder, LIST)
    with suppress(MissingFile):
        try:
            several = json.loads(read_bytes(path))["shardlist"]
            yield from (posixpath.join(folder, posixpath.basename(one["url"])) for one in several)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: is no list of shards ({first_line(error)}). Remove it, or write it again."
            ) from error


def _matches(shard: str, spec: str) -> bool:
    return Path(posixpath.basename(shard)).match(posixpath.basename(spec))


def _index_or_fault(shard: str) -> Index | str:
    try:
        return index_of(shard)
    except UserError as error:
        return str(error)


def _pairs(scan: Scan, shard: str, index: Index) -> Iterator[tuple[str, str]]:
    """The names of each pair's image and captions in a shard."""
    wanted, groups = image_suffixes() | {ARRAY_SUFFIX}, defaultdict[str, list[str]](list)
    scan.num_entries += len(index.names)
    for name in index.repeated:
        scan.faults.append(f"{printable(f'{shard}!{name}')}: occurs more than once. Write the shard again.")
    for name in index.names:
        suffix = posixpath.splitext(name)[1].lower()
        if posixpath.basename(name).startswith("."):
            continue
        if suffix not in wanted | {CAPTION_SUFFIX}:
            scan.others[suffix or "no suffix"] += 1
        else:
            groups[plain_name(_key(name))].append(name)
    for key, files in groups.items():
        images = [name for name in files if not name.lower().endswith(CAPTION_SUFFIX)]
        captions = [name for name in files if name not in images]
        dotted = [name for name in files if "." in posixpath.splitext(posixpath.basename(name))[0]]
        if dotted or len(images) > 1 or len(captions) > 1:
            listed = ", ".join(map(printable, (dotted or files)[:4]))
            scan.faults.append(
                f"{printable(f'{shard}!{key}')}: it is not clear which files form a pair ({listed}). "
                "Expected one image and one .txt for each key, which is what stands before a name's first dot."
            )
        elif images and captions:
            yield images[0], captions[0]
        else:
            (scan.lone_images if images else scan.lone_captions).append(f"{shard}!{files[0]}")


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return posixpath.join(folder, base.partition(".")[0])
