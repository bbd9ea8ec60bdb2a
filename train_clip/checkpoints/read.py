"""A file or folder of weights → what it holds, tensors not included. Nothing in it is run, PyTorch is not imported.

A zip archive of PyTorch's → plain data, and where its tensors lie. Nothing in it is run, PyTorch is not imported.

``torch.save`` and TorchScript write the same thing: a pickle, ``data.pkl``, and an uncompressed entry for each storage.
A pickle is a program for a stack machine. Here is a machine that knows the instructions which data needs and no others,
and whose only functions are those below: a name in a file is a word, never a thing that is imported.
"""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train_clip.errors import UserError

# Bounds of what a file may ask for, far above what files need: some 33 instructions a tensor, a few dimensions.
MAX_PICKLE = 2**28  # bytes
MAX_INSTRUCTIONS = 4_000_000
MAX_DIMENSIONS = 64
MAX_ARGUMENTS = 16
LONGEST_SHOWN = 60  # letters of a name in a message
MAX_KEY = 2**60  # of a whole number that is a key: larger ones can be chosen to share one hash

ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
# The classes that stand for a storage's type (torch.FloatStorage), by the beginning of their names.
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip

# Names that checkpoints hold beside their weights, in older ones of Lightning a run's arguments and its callbacks'
# classes. They come out as a ``StandIn``; any other name is refused.
HARMLESS = (
    "__torch__.", "argparse.Namespace", "collections.", "_codecs.", "lightning.", "lightning_fabric.", "numpy.",
    "omegaconf.", "pathlib.", "pytorch_lightning.", "torch.device",
    # As Python 2 called the module of its own types, which is how they are written.
    *(f"__builtin__.{kind}" for kind in ("set", "frozenset", "complex", "dict", "list", "int", "float", "str", "bool")),
)  # fmt: skip


class BadArchive(Exception):
    """Says what of an archive is not as it should be."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that has not been read.

    Args:
        file: the archive, or a ``.safetensors`` file.
        entry: the storage's name in the archive, or the tensor's in the file.
        dtype: as PyTorch calls it, such as "float32".
        shape: its sizes.
        stride: in elements; None in a ``.safetensors`` file, whose tensors are contiguous.
        offset: of its first element in the storage, in elements.
    """

    file: Path
    entry: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0


class StandIn(NamedTuple):
    """What a file names and nobody here makes.

    Args:
        name: of the class.
        state: the attributes that it was to have.
    """

    name: str
    state: dict[str, Any]


class Outline(NamedTuple):
    """What an archive holds.

    Args:
        data: plain data, tensors as ``TensorRecord``.
        is_script: whether TorchScript wrote it.
    """

    data: Any
    is_script: bool


def read_outline(path: Path) -> Outline:
    """Read an archive's data, tensors not included.

    Raises:
        BadArchive: it asks for what data does not need, or for more than there is.
        zipfile.BadZipFile: it is no archive, or cut short.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = _stored_sizes(path, archive)
        found = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise BadArchive(f"has {len(found)} entries data.pkl, expected one")
        if sizes[found[0]] > MAX_PICKLE:
            raise BadArchive(f"its data.pkl has {sizes[found[0]]:,} bytes, expected {MAX_PICKLE:,} at most")
        prefix = found[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in sizes and archive.read(f"{prefix}byteorder") != b"little":
            raise BadArchive("was written on a machine of the other byte order")
        machine = _Machine(path, prefix, sizes)
        return Outline(machine.run(archive.read(found[0])), f"{prefix}constants.pkl" in archive.namelist())


def _stored_sizes(path: Path, archive: zipfile.ZipFile) -> dict[str, int]:
    """The entries that are not compressed, as all are that hold data, and their bytes: no more than the file's.

    TorchScript compresses its code, which is not read. What is not stored as it is could unpack to anything.
    """
    stored = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
    sizes = {entry.filename: entry.file_size for entry in stored}
    if len(sizes) < len(stored):
        raise BadArchive("has two entries of one name")
    if any(entry.file_size != entry.compress_size for entry in stored) or sum(sizes.values()) > path.stat().st_size:
        raise BadArchive("its entries claim more bytes than it has")
    return sizes


class _Storage(NamedTuple):
    entry: str
    dtype: str
    numel: int


class _Name(NamedTuple):
    """What a file calls a function or a class, and what is made when it asks to call it."""

    name: str
    make: Callable[..., Any]


class _Machine:
    """Runs the pickle's program over a stack of plain data.

    Args:
        file: the archive, for the records.
        prefix: of the archive's entries.
        sizes: of each entry, in bytes.
    """

    def __init__(self, file: Path, prefix: str, sizes: dict[str, int]) -> None:
        self.file, self.prefix, self.sizes = file, prefix, sizes
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The data that is on the stack at the end."""
        for number, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            if number > MAX_INSTRUCTIONS:
                raise BadArchive(f"its data.pkl has more than {MAX_INSTRUCTIONS:,} instructions")
            if instruction.name == "STOP":
                break
            if instruction.name not in INSTRUCTIONS:
                raise BadArchive(f"its data.pkl has the instruction {instruction.name}, which weights do not need")
            INSTRUCTIONS[instruction.name](self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        """Put a value on top of the stack."""
        self.stack.append(value)

    def remember(self, place: int) -> None:
        """Keep the value on top by a number, to be put on the stack again."""
        self.memo[place] = self.stack[-1]

    def mark(self) -> None:
        """Begin a new stack on top of the one at hand."""
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """The items since the mark, which are taken off."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def take(self, number: int) -> list[Any]:
        """The last items, which are taken off."""
        if len(self.stack) < number:
            raise BadArchive("its data.pkl takes more off its stack than is there")
        items, self.stack[-number:] = self.stack[-number:], []
        return items

    def append(self, items: list[Any]) -> None:
        """Add items to the list on top; a stand-in's, such as a deque's, are passed over."""
        if not isinstance(self.stack[-1], StandIn):
            _require(self.stack[-1], list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values to the dict on top; a stand-in's are passed over."""
        if isinstance(self.stack[-1], StandIn):
            return
        target = _require(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, int) and abs(key) > MAX_KEY:
                raise BadArchive("its data.pkl has a key that is a very large number")
            # A tuple within a tuple, a million deep, would end Python when it is hashed.
            target[_require(key, str | int | float | None | _Name)] = value

    def call(self) -> None:
        """Put what a name makes of its arguments in its place: one of the functions below, or a stand-in."""
        name, arguments = self.take(2)
        if len(_require(arguments, tuple)) > MAX_ARGUMENTS:
            raise BadArchive(f"its data.pkl calls something with {len(arguments):,} arguments")
        self.push(_require(name, _Name).make(*arguments))

    def build(self) -> None:
        """Give a stand-in its attributes; a state dict's own (the versions of its modules) are passed over."""
        (state,) = self.take(1)
        if isinstance(self.stack[-1], StandIn):
            if self.stack[-1].state:
                raise BadArchive("its data.pkl gives one thing its attributes twice")
            # A class may pack its state otherwise, as NumPy's do, which nobody here unpacks.
            if isinstance(state, dict):
                self.stack[-1].state.update({name: value for name, value in state.items() if isinstance(name, str)})
        else:
            _require(self.stack[-1], dict)

    def storage(self) -> None:
        """Look up the storage that a tensor lies in: ("storage", type, key, device, number of elements)."""
        (words,) = self.take(1)
        _, kind, key, _, numel = _require(words, tuple)
        name = _require(kind, _Name).name.removeprefix("torch.").removesuffix("Storage")
        if name not in STORAGES:
            raise BadArchive(f"has a tensor of type {name[:LONGEST_SHOWN]}; known: {', '.join(STORAGES)}")
        dtype, entry = STORAGES[name], f"{self.prefix}data/{_require(key, str)}"
        if self.sizes.get(entry, -1) != _require(numel, int) * ITEM_SIZES[dtype]:
            raise BadArchive(f"its entry {entry} is missing, or not of {numel:,} {dtype}")
        self.push(_Storage(entry, dtype, numel))

    def name(self, argument: str) -> None:
        """Look up what a name makes; the pickle has module and name with a blank between."""
        self.push(_Name(name := argument.replace(" ", "."), self._maker(name)))

    def _maker(self, name: str) -> Callable[..., Any]:
        if name == "torch._utils._rebuild_tensor_v2":
            return self.tensor
        if name in MAKERS:
            return MAKERS[name]
        is_type = name.startswith("torch.") and (name.endswith("Storage") or name.removeprefix("torch.") in ITEM_SIZES)
        if is_type or name.startswith(HARMLESS):
            return lambda *_: StandIn(name, {})
        if name.startswith("torch.nn."):
            raise BadArchive(
                "holds a whole pickled module, which only its code can open. Save its weights where that code is: "
                "torch.save(model.state_dict(), FILE)"
            )
        raise BadArchive(f"asks for {name}, which weights do not need; nothing of it was run")

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> TensorRecord:
        """A tensor within its storage. A stride of 0 would claim any number of elements for a few bytes."""
        _require(storage, _Storage)
        numbers = (offset, *_sizes(shape), *_sizes(stride))
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(shape) != len(stride):
            raise BadArchive("has a tensor whose shape and strides are not as many whole numbers")
        if len(others) > CHANGED and others[CHANGED]:
            raise BadArchive("has a tensor that is a view of another with its signs changed. Save it as it is: clone()")
        numel = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if numel > storage.numel or (numel and last >= storage.numel):
            raise BadArchive(f"has a tensor of shape {shape} in a storage of {storage.numel:,} elements")
        return TensorRecord(self.file, storage.entry, storage.dtype, shape, stride, offset)


CHANGED = 2  # its place behind the stride, after requires_grad and hooks: what else is done to a tensor


def _sizes(sizes: Any) -> tuple[Any, ...]:
    """A shape or strides, of so few numbers that they can be multiplied and printed."""
    if len(_require(sizes, tuple | list)) > MAX_DIMENSIONS:
        raise BadArchive(f"has a tensor of {len(sizes):,} dimensions")
    return tuple(sizes)


def _require(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise BadArchive(f"its data.pkl has a {type(value).__name__} where another thing belongs")
    return value


# By the name in the file, what is made in place of what it names, besides tensors. Dicts get their items afterwards.
MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_parameter": lambda tensor, *_: _require(tensor, TensorRecord),
    "torch.Size": _sizes,
    "torch.jit._pickle.restore_type_tag": lambda value, *_: value,
    "collections.OrderedDict": lambda *_: {},
    "collections.defaultdict": lambda *_: {},
    **{
        f"torch.jit._pickle.build_{kind}list": lambda items: _require(items, list)
        for kind in ("int", "double", "bool", "tensor")
    },
}

Step = Callable[[_Machine, Any], None]


def _puts(value: Callable[[Any], Any]) -> Step:
    return lambda machine, argument: machine.push(value(argument))


def _tuple_of(number: int) -> Step:
    return lambda machine, _: machine.push(tuple(machine.take(number)))


# By the name that pickletools has for it.
INSTRUCTIONS: dict[str, Step] = {
    "PROTO": lambda *_: None,
    "NONE": _puts(lambda _: None),
    "NEWTRUE": _puts(lambda _: True),
    "NEWFALSE": _puts(lambda _: False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _puts(lambda value: value)),
    "EMPTY_DICT": _puts(lambda _: {}),
    "EMPTY_LIST": _puts(lambda _: []),
    "EMPTY_TUPLE": _puts(lambda _: ()),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, place: machine.remember(place)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: machine.push(machine.memo[place])),
    "GLOBAL": lambda machine, name: machine.name(name),
    "BINPERSID": lambda machine, _: machine.storage(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call()),
    "BUILD": lambda machine, _: machine.build(),
}


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
