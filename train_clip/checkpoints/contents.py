"""A file or folder of weights → what it holds, tensors not included. Nothing in it is run, PyTorch is not imported."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_clip.checkpoints.archive import (
    ITEM_SIZES,
    LONGEST_SHOWN,
    MAX_DIMENSIONS,
    BadArchive,
    StandIn,
    TensorRecord,
    read_outline,
)
from train_clip.errors import UserError

OPEN_CLIP_CONFIG = "open_clip_config.json"
HF_CONFIG = "config.json"
HF_PIXELS = "preprocessor_config.json"
HF_PROCESSOR = "processor_config.json"  # which transformers 5 writes in place of the one before
CONFIGS = (OPEN_CLIP_CONFIG, HF_CONFIG, HF_PIXELS, HF_PROCESSOR)
OPEN_CLIP_WEIGHTS, HF_WEIGHTS = "open_clip_model.safetensors", "model.safetensors"
# In the order in which they are looked for; an index lists the files of a model in several.
WEIGHTS = (
    OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.bin", HF_WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip

MAX_DEPTH = 100  # of modules within modules
MAX_JSON = 2**24  # bytes of a configuration or an index
LONGEST_NAME = 255  # bytes of a file's name
MAX_HEADER = 100_000_000  # bytes of a .safetensors header, as its library has it
# Names of dtypes in a .safetensors header.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


@dataclass(frozen=True)
class Contents:
    """What lies in a file or folder.

    Args:
        path: what messages name.
        kind: the container: "PyTorch archive", "TorchScript archive" or "safetensors".
        data: what a PyTorch archive holds, tensors as ``TensorRecord``; of a TorchScript archive the class of each
            module by its name; empty for safetensors.
        tensors: the weights by the names that they have there.
        metadata: of a ``.safetensors`` file.
        configs: the JSON files beside the weights, by name; ``settings`` reads them.
    """

    path: Path
    kind: str
    data: Mapping[str, Any]
    tensors: Mapping[str, TensorRecord]
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Path] = field(default_factory=dict)

    def settings(self, name: str) -> Mapping[str, Any]:
        """What a JSON file beside the weights says; nothing where there is none.

        Raises:
            UserError: as ``read_json``.
        """
        return read_json(self.configs[name]) if name in self.configs else {}


def read_contents(path: Path) -> Contents:
    """Look into a file, or into a folder as Hugging Face and open_clip write them.

    Raises:
        UserError: there is nothing, nothing that holds weights, or something that is damaged or hostile.
    """
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is longer than names can be
        raise UserError(f"{path}: {error.strerror}.{EXPECTED}") from error
    if is_folder:
        return gather_contents(path, lambda name: path / name if (path / name).is_file() else None)
    if not path.is_file():
        raise UserError(f"{path}: {'is no regular file' if path.exists() else 'there is no such file'}.{EXPECTED}")
    configs = {name: path.with_name(name) for name in CONFIGS if path.with_name(name).is_file()}
    return _read_file(path, configs)


def gather_contents(path: Path, find: Callable[[str], Path | None]) -> Contents:
    """Look into a folder, here or on a hub.

    Args:
        path: what messages name.
        find: gives the place of a file by its name; None where there is none.

    Raises:
        UserError: as ``read_contents``.
    """
    configs = {name: found for name in CONFIGS if (found := find(name)) is not None}
    for name in WEIGHTS:
        if (found := find(name)) is None:
            continue
        if not name.endswith(".index.json"):
            return _read_file(found, configs, path)
        parts = []
        for part in _parts(found):
            if (file := find(part)) is None:
                raise UserError(f"{path}: {name} lists {part}, which is not there. Get the folder again.")
            parts.append(_read_file(file, configs, path))
        tensors = {key: record for contents in parts for key, record in contents.tensors.items()}
        return Contents(path, parts[0].kind, {}, tensors, {}, configs)
    raise UserError(f"{path}: a folder without weights; expected one of {', '.join(WEIGHTS)}.{EXPECTED}")


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a file of settings.

    Raises:
        UserError: too large, not JSON, or not keys and values.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise UserError(f"{path}: {size:,} bytes; expected a JSON file of {MAX_JSON:,} at most.")
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}). Get the file again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, expected keys and values.")
    return values


EXPECTED = (
    " Expected a checkpoint (.ckpt), weights (.pt, .bin, .safetensors), a folder that holds config.json and weights, "
    "a name of OpenAI's such as ViT-B/32, or hf-hub:NAME."
)


def _read_file(path: Path, configs: Mapping[str, Path], named: Path | None = None) -> Contents:
    """Look into one file; whatever a foreign, damaged or hostile one raises becomes a message that names it."""
    named = named or path
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
        if start.startswith(ZIP):
            return _read_archive(path, configs, named)
        if start == LEGACY:
            raise UserError(
                f"{path}: written by PyTorch before 1.6, or in its old form. Write it anew with "
                "torch.save(torch.load(FILE, weights_only=True), NEW)."
            )
        if path.suffix.casefold() == ".safetensors" or start[8:9] == b"{":
            return _read_safetensors(path, configs, named)
    except UserError:
        raise
    except BadArchive as error:
        raise UserError(f"{path}: {error}. Nothing was loaded.") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: an archive that is cut short or damaged ({error}). Get the file again.") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path}: no weights, or damaged ones ({reason}). Get the file again.") from error
    what = "is empty" if not start else f"begins with {start[:8]!r}"
    raise UserError(f"{path}: {what}, which no file of weights does.{EXPECTED}")


def _read_archive(path: Path, configs: Mapping[str, Path], named: Path) -> Contents:
    outline = read_outline(path)
    if outline.is_script and isinstance(outline.data, StandIn):
        tensors, classes = _walk(outline.data)
        return Contents(named, "TorchScript archive", classes, tensors, {}, configs)
    if not isinstance(outline.data, dict):
        raise UserError(
            f"{path}: holds a {type(outline.data).__name__}; expected a state dict, or a checkpoint of one."
        )
    state = outline.data.get("state_dict", outline.data)
    tensors = {
        name: value
        for name, value in _mapping(state).items()
        if isinstance(name, str) and isinstance(value, TensorRecord)
    }
    if not tensors:
        held = ", ".join(key[:LONGEST_SHOWN] for key in list(outline.data)[:6] if isinstance(key, str)) or "nothing"
        raise UserError(f"{path}: holds no weights (but {held}).{EXPECTED}")
    return Contents(named, "PyTorch archive", outline.data, tensors, {}, configs)


def _walk(module: StandIn) -> tuple[dict[str, TensorRecord], dict[str, str]]:
    """Every tensor of a TorchScript module, and the class of every module in it, by their dotted names.

    Without recursion: files nest at will.
    """
    tensors: dict[str, TensorRecord] = {}
    classes: dict[str, str] = {}
    waiting, seen = [("", module)], set()
    while waiting:
        name, part = waiting.pop()
        if name.count(".") > MAX_DEPTH:
            raise BadArchive(f"has modules nested more than {MAX_DEPTH} deep")
        if id(part) in seen:
            raise BadArchive("has a module that is a part of itself, or of two others")
        seen.add(id(part))
        classes[name.rstrip(".")] = part.name
        tensors |= {name + key: value for key, value in part.state.items() if isinstance(value, TensorRecord)}
        waiting += [(f"{name}{key}.", value) for key, value in part.state.items() if isinstance(value, StandIn)]
    return tensors, classes


def _read_safetensors(path: Path, configs: Mapping[str, Path], named: Path) -> Contents:
    """Read the header: its length in 8 bytes, then JSON of each tensor's dtype, shape and place."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise BadArchive(f"its header would have {length:,} bytes, in a file of {size:,}")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadArchive("its metadata are not words by their names")
    tensors = {name: _record(path, name, entry, size - 8 - length) for name, entry in header.items()}
    return Contents(named, "safetensors", {}, tensors, metadata, configs)


def _record(path: Path, name: str, entry: Mapping[str, Any], room: int) -> TensorRecord:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise BadArchive(f"its tensor {name[:LONGEST_SHOWN]} has {len(shape):,} dimensions")
    if dtype not in DTYPES:
        raise BadArchive(f"its tensor {name} is of type {dtype}; known: {', '.join(DTYPES)}")
    if not 0 <= start <= end <= room or end - start != math.prod(shape) * ITEM_SIZES[DTYPES[dtype]]:
        raise BadArchive(f"its tensor {name} of shape {shape} is not in the file, or not all of it")
    return TensorRecord(path, name, DTYPES[dtype], shape)


def _parts(index: Path) -> list[str]:
    """The files that an index lists; a path in place of a name would leave the folder."""
    parts = sorted(set(map(str, _mapping(read_json(index).get("weight_map", {})).values())))
    odd = [part for part in parts if Path(part).name != part or len(part.encode()) > LONGEST_NAME]
    if odd := odd or ([] if parts else ["no file"]):
        raise UserError(f"{index}: lists {odd[0][:LONGEST_SHOWN]}; expected names of files beside it.")
    return parts


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
