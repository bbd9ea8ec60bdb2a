"""A file of weights → what it holds. No code of a file is run, and PyTorch is imported for its tensors only.

``torch.save`` and TorchScript write a zip archive: a pickle, ``data.pkl``, and an uncompressed entry for each storage.
"""

import io
import json
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train_clip.errors import UserError, first_line, root_cause

# Bounds of what a file may ask for, far above what files need: some 33 instructions a tensor, a few dimensions.
MAX_PICKLE, MAX_HEADER, MAX_JSON = 2**28, 100_000_000, 2**24  # bytes of data.pkl, a header, a configuration
MAX_INSTRUCTIONS, MAX_NAMES, MAX_ARGUMENTS = 4_000_000, 10_000, 16
MAX_DIMENSIONS, MAX_DEPTH = 64, 100  # of a tensor; of modules within modules
MAX_KEY = 2**60  # of a whole number that is a key: larger ones can be chosen to share one hash
MAX_SHARED = 4  # times the file's size that its tensors may take; tied weights make it less than 2
MOST_SHOWN = 200  # letters of a file's own names in a message

# By dtype: its bytes, the beginning of its storage's name (torch.FloatStorage), its name in a .safetensors header.
KINDS = {
    "float64": (8, "Double", "F64"), "float32": (4, "Float", "F32"), "float16": (2, "Half", "F16"),
    "bfloat16": (2, "BFloat16", "BF16"), "int64": (8, "Long", "I64"), "int32": (4, "Int", "I32"),
    "int16": (2, "Short", "I16"), "int8": (1, "Char", "I8"), "uint8": (1, "Byte", "U8"), "bool": (1, "Bool", "BOOL"),
}  # fmt: skip
STORAGES = {f"torch.{kind}Storage": dtype for dtype, (_, kind, _) in KINDS.items()}
DTYPES = {kind: dtype for dtype, (_, _, kind) in KINDS.items()}
# Names that checkpoints hold beside their weights, in older ones of Lightning a run's arguments and its callbacks'
# classes; Python 2 called the module of its own types __builtin__. Any other name is refused.
HARMLESS = tuple(
    "__torch__. argparse.Namespace collections. _codecs. datetime. lightning. lightning_fabric. numpy. omegaconf. "
    "pathlib. pytorch_lightning. torch.Tensor torch.device __builtin__.set __builtin__.frozenset __builtin__.complex "
    "__builtin__.dict __builtin__.list __builtin__.int __builtin__.float __builtin__.str __builtin__.bool".split()
)
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
EXPECTED = (
    " Expected a checkpoint (.ckpt), weights (.pt, .bin, .safetensors), a folder that holds config.json and weights, "
    "a name of OpenAI's such as ViT-B/32, or hf-hub:NAME."
)
EXPORT = (
    "If you trust it, export its weights where all its code is installed: model = torch.load(FILE, "
    "weights_only=False); torch.save(model.state_dict(), NEW). Of a checkpoint: torch.save(model['state_dict'], NEW)"
)


class TensorRecord(NamedTuple):
    """A tensor that has not been read. A NamedTuple: a pickle can change nothing of it."""

    file: Path  # the archive, or a .safetensors file
    entry: str  # the storage's name in the archive, or the tensor's in the file
    dtype: str  # as PyTorch calls it, such as "float32"
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # in elements; None in a .safetensors file, whose tensors are contiguous
    offset: int = 0  # of its first element in the storage, in elements


class StandIn:
    """What a file names, by its class: makes what ``MAKERS`` says, or itself, of any arguments and state."""

    state: Mapping[str, Any] = {}  # the attributes that it was to have, once it has them

    def __new__(cls, *arguments: Any) -> Any:  # noqa: D102, a call of what the file names
        if len(arguments) > MAX_ARGUMENTS:
            raise UserError(f"its data.pkl calls something with {len(arguments):,} arguments")
        return MAKERS[cls.__name__](*arguments) if cls.__name__ in MAKERS else super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        # A class may pack its state otherwise, as NumPy's do, which nobody here unpacks.
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, *_: Any) -> None: ...

    def extend(self, _: Any) -> None: ...  # noqa: D102, of a queue


@dataclass(frozen=True)
class Contents:
    """The contents of a file or folder."""

    path: Path  # what messages name
    kind: str  # "PyTorch archive", "TorchScript archive" or "safetensors"
    # Of a PyTorch archive all of it, then what is around the weights (``state_dicts.choose``); of a TorchScript archive
    # each module's class by the module's name; of safetensors its metadata.
    data: Any
    tensors: dict[str, TensorRecord]  # the weights by the names that they have there
    configs: Mapping[str, Path] = field(default_factory=dict)  # the JSON files beside the weights, by name
    place: str = ""  # of the weights in the file, such as "state_dict"
    left_out: tuple[str, ...] = ()  # the places of other CLIPs in the file, and tensors around this one

    def settings(self, name: str) -> dict[str, Any]:
        """The values in a JSON file next to the weights; empty if there is none."""
        return read_json(self.configs[name]) if name in self.configs else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of settings of limited size."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise UserError(f"{path}: {size:,} bytes; expected a JSON file of {MAX_JSON:,} at most.")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes | str, source: str) -> dict[str, Any]:
    """Read settings: keys and values."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source}: not JSON of keys and values ({error}). Get the file again.") from error


def read_file(path: Path) -> Contents:
    """Look into one file; any error of a foreign, damaged or hostile file becomes a message that names it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
        if start.startswith(ZIP):
            return _read_weights(path)
        if path.suffix.casefold() == ".safetensors" or start[8:9] == b"{":
            return _read_safetensors(path)
        if start == LEGACY:
            raise UserError(
                "written by PyTorch before 1.6, or in its old format. Convert it with "
                "torch.save(torch.load(FILE, weights_only=True), NEW)."
            )
        if start.startswith(b"\x80"):
            raise UserError(
                "a plain pickle, which is not opened. If you trust it: torch.save(pickle.load(open(FILE, 'rb')), NEW)"
            )
        raise UserError(f"begins with {start[:8]!r}, which no weights file does.{EXPECTED}")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removesuffix('.')}.") from error
    except Exception as error:
        raise UserError(f"{path}: not weights, or damaged ({root_cause(error)}). Get the file again.") from error


def _read_weights(path: Path) -> Contents:
    data = read_archive(path)
    if isinstance(data, StandIn) and type(data).__name__.startswith("__torch__."):
        return _read_modules(path, data)
    return Contents(path, "PyTorch archive", data, {})


def _read_modules(path: Path, module: StandIn) -> Contents:
    """Find every tensor of a TorchScript module, and each module's class. Without recursion: files nest at will."""
    tensors, classes = {}, {}
    waiting, seen = [("", module)], set()
    while waiting:
        name, part = waiting.pop()
        if id(part) in seen or name.count(".") > MAX_DEPTH:
            raise UserError(
                f"has a module that is part of itself or of two others, or nested more than {MAX_DEPTH} deep"
            )
        seen.add(id(part))
        classes[name.rstrip(".")] = type(part).__name__
        for key, value in part.state.items():
            if isinstance(value, TensorRecord):
                tensors[f"{name}{key}"] = value
            elif isinstance(value, StandIn):
                waiting.append((f"{name}{key}.", value))
    return Contents(path, "TorchScript archive", classes, tensors)


def read_archive(path: Path) -> Any:
    """Read an archive's data, tensors as ``TensorRecord`` and a TorchScript module as a ``StandIn``."""
    with zipfile.ZipFile(path) as archive:
        # TorchScript compresses its code, which is not read. What is not stored as it is could unpack to anything.
        stored = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
        sizes = {entry.filename: entry.file_size for entry in stored}
        is_whole = len(sizes) == len(stored) and sum(sizes.values()) <= path.stat().st_size
        if not is_whole or any(entry.file_size != entry.compress_size for entry in stored):
            raise UserError("has two entries with the same name, or entries that claim more bytes than the file has")
        found = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise UserError(f"has {len(found)} entries data.pkl, expected one")
        pickled = found[0]
        if sizes[pickled] > MAX_PICKLE:
            raise UserError(f"its data.pkl has {sizes[pickled]:,} bytes, expected {MAX_PICKLE:,} at most")
        prefix = pickled.removesuffix("data.pkl")
        if f"{prefix}byteorder" in sizes and archive.read(f"{prefix}byteorder") != b"little":
            raise UserError("was written on a machine with the other byte order")
        program = archive.read(pickled)
    _require_data(program)
    return _unpickle(program, path, prefix, sizes)


# Instructions that data needs; what the first ones put on the stack may be a key.
KEYS = frozenset("NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE GLOBAL".split())
INSTRUCTIONS = KEYS.union(
    "PROTO MARK STOP EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS "
    "BUILD REDUCE NEWOBJ BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET".split()
)


def _require_data(program: bytes) -> None:
    """Go through a pickle without running it: known instructions, not too many, and keys that are quickly hashed.

    A tuple as a key, a million deep, would end Python; so many numbers of one hash take it an hour.
    """
    stack, marks, memo = list[bool](), [0], {}  # of each value, whether it may be a key
    instructions: Iterator[Any] = pickletools.genops(program)
    for number, (code, argument, _) in enumerate(instructions):
        name, takes = code.name, code.stack_before
        if name not in INSTRUCTIONS:
            raise UserError(
                f"its data.pkl has the instruction {name}, which weights do not need, perhaps of a later protocol of "
                "pickle. If you trust it, save it with PyTorch's: torch.save(torch.load(FILE, weights_only=False), NEW)"
            )
        # Two of what is taken are the mark, which is not on this stack, and all above it.
        above = marks.pop() + 2 if pickletools.markobject in takes else len(stack)
        start = above - len(takes)
        if start < marks[-1] or max(number, argument if name == "LONG_BINPUT" else 0) > MAX_INSTRUCTIONS:
            raise UserError(
                f"its data.pkl has over {MAX_INSTRUCTIONS:,} instructions or memo entries, or underflows its stack"
            )
        if name.startswith("SETITEM") and not all(stack[start + 1 :: 2]):
            raise UserError(f"its data.pkl has a key that is not a string or number, or is very large. {EXPORT}")
        del stack[start:]
        if name == "MARK":
            marks.append(start)
        elif name.endswith("BINPUT"):
            memo[argument] = stack[-1]
        else:
            is_key = name in KEYS and (name != "LONG1" or abs(argument) <= MAX_KEY)
            stack += [memo[argument] if name.endswith("BINGET") else is_key] * len(code.stack_after)


class _Storage(NamedTuple):
    file: Path
    entry: str
    dtype: str
    numel: int


def _unpickle(program: bytes, file: Path, prefix: str, sizes: Mapping[str, int]) -> Any:
    """Make plain data, records of tensors, and stand-ins: a name in a file is a word, and never imported."""
    classes: dict[str, type] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type:
            name = f"{module}.{name}"
            is_known = name in STORAGES or name in MAKERS or name.startswith(HARMLESS)
            if not (is_known or name.removeprefix("torch.") in KINDS) or len(classes) > MAX_NAMES:
                raise UserError(
                    f"asks for {name[:MOST_SHOWN]}, which weights do not need: it holds a whole pickled module, or "
                    f"another object; no code of it was run. {EXPORT}"
                )
            return classes.setdefault(name, type(name, (StandIn,), {}))

        def persistent_load(self, words: Any) -> _Storage:
            _, kind, key, _, numel = words  # "storage", type, key, device, number of elements
            dtype, entry = STORAGES[kind.__name__], f"{prefix}data/{_require(key, str)}"
            if sizes.get(entry, -1) != numel * KINDS[dtype][0]:
                raise UserError(f"its entry {entry} is missing, or not of {numel:,} {dtype}")
            return _Storage(file, entry, dtype, numel)

    return Unpickler(io.BytesIO(program)).load()


class _Dict(dict[Any, Any]):
    def __setstate__(self, _: Any) -> None: ...  # a state dict's versions of its modules


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> TensorRecord:
    """Make a tensor within its storage. A stride of 0 would claim any number of elements for a few bytes."""
    file, entry, dtype, numel = _require(storage, _Storage)
    shape, stride = _sizes(shape), _sizes(stride)
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise UserError("has a tensor whose shape and strides are not equally many integers")
    if others[2:3] and others[2]:  # behind requires_grad and hooks: what else is done to a tensor
        raise UserError("has a tensor that is a view of another with its sign changed. Save a copy of it: clone()")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if (elements := math.prod(shape)) and max(elements, last + 1) > numel:
        raise UserError(f"has a tensor of shape {shape} in a storage of {numel:,} elements")
    return TensorRecord(file, entry, dtype, shape, stride, offset)


def _sizes(sizes: Any) -> tuple[Any, ...]:
    # So few that they can be multiplied and printed.
    if len(sizes) > MAX_DIMENSIONS:
        raise UserError(f"has a tensor of {len(sizes):,} dimensions")
    return tuple(sizes)


def _require(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"it has a {type(value).__name__} in the wrong place")
    return value


# By the name in the file, what is made in place of what it names. Dicts get their items afterwards.
MAKERS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: _require(tensor, TensorRecord),
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: _require(tensor, TensorRecord),
    "torch._tensor._rebuild_from_type_v2": lambda _function, _type, arguments, *_: _tensor(*arguments),
    "torch.Size": _sizes,
    "torch.jit._pickle.restore_type_tag": lambda value, *_: value,
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict"), lambda *_: _Dict()),
    **{
        f"torch.jit._pickle.build_{kind}list": lambda items: _require(items, list)
        for kind in ("int", "double", "bool", "tensor")
    },
}


def _read_safetensors(path: Path) -> Contents:
    """Read the header: its length in 8 bytes, then JSON of each tensor's dtype, shape and place."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"its header would have {length:,} bytes, in a file of {size:,}")
        header = json.loads(file.read(length))
    data, tensors = dict(header.pop("__metadata__", {})), {}
    for name, entry in header.items():
        shape, (start, end) = _sizes(entry["shape"]), entry["data_offsets"]
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise UserError(f"its tensor {name} is of type {entry['dtype']}; known: {', '.join(DTYPES)}")
        if not 0 <= start <= end <= size - 8 - length or end - start != math.prod(shape) * KINDS[dtype][0]:
            raise UserError(f"its tensor {name} of shape {shape} is not in the file, or not all of it")
        tensors[name] = TensorRecord(path, name, dtype, shape)
    return Contents(path, "safetensors", data, tensors)


def read_tensors(records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    """Read tensors into memory, verifying checksums if there are any; floats become float32."""
    tensors = {}
    for file in {record.file for record in records.values()}:
        try:
            for name, tensor in _read_from(file, {name: one for name, one in records.items() if one.file == file}):
                tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        except Exception as error:
            # Damaged archives raise whatever their parsers do, from BadZipFile and EOFError to UnicodeDecodeError.
            reason = first_line(error)
            raise UserError(f"{file}: damaged ({reason}). Get the file again, or use another checkpoint.") from error
    return {name: tensors[name] for name in records}


def _read_from(file: Path, records: Mapping[str, TensorRecord]) -> Iterator[tuple[str, Any]]:
    import torch
    from safetensors import safe_open

    if next(iter(records.values())).stride is None:
        with safe_open(file, framework="pt") as tensors:
            # Copies: a model on a mapped file would change with the file, and keep Windows from replacing it.
            yield from ((name, tensors.get_tensor(record.entry).clone()) for name, record in records.items())
        return
    num_bytes = sum(math.prod(record.shape) * KINDS[record.dtype][0] for record in records.values())
    if num_bytes > MAX_SHARED * file.stat().st_size:
        raise UserError("many tensors share the same storage")
    with zipfile.ZipFile(file) as archive:
        entry = None
        for name, record in sorted(records.items(), key=lambda item: item[1].entry):
            if record.entry != entry:
                entry, dtype = record.entry, getattr(torch, record.dtype)
                # PyTorch wants memory that it may write to, and some, for tensors of no elements too.
                storage = torch.frombuffer(bytearray(archive.read(entry) or bytes(8)), dtype=dtype)
            elif dtype is not getattr(torch, record.dtype):  # which PyTorch reads one way or the other, by its version
                raise UserError(f"its entry {entry} holds numbers of two types")
            # What shared its storage in the file is no longer one when it is trained.
            yield name, storage.as_strided(record.shape, record.stride or (), record.offset).clone()
