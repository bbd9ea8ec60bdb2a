"""Small files that ask for much: each ends in bounded time and memory, in a process of its own that stays alive.

Time is the processor's, so that a busy machine changes nothing; memory is what the process takes beyond its start.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints.by_hand import (
    APPENDS,
    BUILD,
    DICT,
    EMPTY,
    LIST,
    MARK,
    NEWOBJ,
    NONE,
    REDUCE,
    SETITEM,
    SETITEMS,
    START,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
    many,
    named,
    number,
    recall,
    state,
    storage,
    store,
    tensor,
    text,
    tiny_clip,
    write,
)
from train_clip.checkpoints.huggingface import write_huggingface

SECONDS = 20  # of the processor: four million instructions take a third of it
MIB = 1024  # beyond the start; no file here has more than 21 of it

CHILD = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
import train_clip.data.crops
from tests.checkpoints.by_hand import look, read_all
from train_clip import load
from train_clip.commands.inspect import inspect
from train_clip.errors import UserError

READERS = {"read": read_all, "look": look, "inspect": lambda path: inspect(str(path)), "load": load}
for path in map(Path, sys.argv[2:]):
    reader = READERS[path.name.partition(" ")[0]]
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        try:
            reader(path)
            outcome = "read"
        except UserError as error:
            outcome = "refused: " + str(error).replace(str(path), "FILE")[:300]
        except BaseException as error:
            outcome = f"raised {type(error).__name__}: {str(error)[:200]}"
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        os.write(into, json.dumps([outcome, taken]).encode())
        os._exit(0)
    os.close(into)
    found = os.fdopen(out).read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    start = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20
    print(json.dumps([path.name, *(json.loads(found) if found else [f"killed by signal {-ended}", start]), start]))
"""


def doubling(levels: int) -> bytes:
    """Pairs of pairs: as many places as levels, and 2 to their power when it is printed."""
    return text("x") + b"".join(store(level) + recall(level) + TUPLE2 for level in range(levels))


def colliding(keys: int) -> bytes:
    """A dict of whole numbers that have one hash, so that each is compared with all before it."""
    return DICT + MARK + b"".join(number(index * (2**61 - 1)) + NONE for index in range(1, keys)) + SETITEMS


def chain(modules: int) -> bytes:
    """A script's module within a module: the dotted names together are half the square of the modules long."""
    outer = named("__torch__.M") + store(0) + EMPTY + NEWOBJ + DICT + text("a" * 50) + store(1)
    inner = recall(0) + EMPTY + NEWOBJ + DICT + recall(1)
    return outer + inner * (modules - 1) + NONE + (SETITEM + BUILD) * modules


def rebuilt(attributes: int, times: int) -> bytes:
    """An object that is given its many attributes many times."""
    items = b"".join(text(str(index)) + NONE for index in range(attributes))
    whole = named("__torch__.M") + EMPTY + NEWOBJ + DICT + MARK + items + SETITEMS + store(0) + BUILD
    return whole + (recall(0) + BUILD) * times


def called(arguments: int, times: int) -> bytes:
    """A function that is called many times with many arguments."""
    first = named("collections.OrderedDict") + store(0) + MARK + NONE * arguments + TUPLE + store(1) + REDUCE
    return LIST + MARK + first + (recall(0) + recall(1) + REDUCE) * times + APPENDS


def copied(items: int, times: int) -> bytes:
    """A long list, of which a tuple is made again and again."""
    held = LIST + MARK + NONE * items + APPENDS + TUPLE1 + store(1)
    first = named("torch.Size") + store(0) + held + REDUCE
    return LIST + MARK + first + (recall(0) + recall(1) + REDUCE) * times + APPENDS


def zeros(mebibytes: int) -> bytes:
    """So much of nothing, deflated: pieces that were flushed may follow one another."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * mebibytes + packer.flush()


def deflated(path: Path, name: str, content: bytes, size: int) -> None:
    """Add an entry that has been deflated already, and says that so many bytes come out, all of them nothing."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)
        entry = archive.getinfo(name)
        entry.compress_type, entry.file_size, entry.CRC = zipfile.ZIP_DEFLATED, size, zlib.crc32(bytes(size))


def expanding_storages(path: Path) -> None:
    """Forty storages of 64 MiB in a file of 3."""
    held = {
        f"w{key}": tensor(storage(text(str(key)), numel=number(2**24)), shape=many(number(2**24))) for key in range(40)
    }
    write(path, state(**held), {})
    content = zeros(64)
    for key in range(40):
        deflated(path, f"a/data/{key}", content, 2**26)


def overlapping_storages(path: Path) -> None:
    """Each storage has all those behind it within it: eighty of 20 MiB in a file of 20."""
    count, body = 80, bytes(20 * 2**20)
    names = [f"a/data/{key:02}".encode() for key in range(count)]
    headers = [b""] * count
    content, checks, sizes = body, [0] * count, [0] * count
    for key in reversed(range(count)):
        checks[key], sizes[key] = zlib.crc32(content), len(content)
        numbers = (20, 0, 0, 0, 33, checks[key], sizes[key], sizes[key], len(names[key]), 5)
        headers[key] = b"PK\3\4" + struct.pack("<HHHHHIIIHH", *numbers) + names[key] + bytes(5)
        content = headers[key] + content
    held = {
        f"w{key}": tensor(storage(text(f"{key:02}"), numel=number(size // 4)), shape=many(number(size // 4)))
        for key, size in enumerate(sizes)
    }
    write(path, state(**held), {})
    start = path.stat().st_size
    old = path.read_bytes()
    directory = old[old.index(b"PK\1\2") : old.index(b"PK\5\6")]
    place = start
    for key in range(count):
        numbers = (20, 20, 0, 0, 0, 33, checks[key], sizes[key], sizes[key], len(names[key]), 0, 0, 0, 0, 0, place)
        directory += b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", *numbers) + names[key]
        place += len(headers[key])
    end = struct.pack("<HHHHIIH", 0, 0, count + 2, count + 2, len(directory), start + len(content), 0)
    path.write_bytes(old + content + directory + b"PK\5\6" + end)


def tied(path: Path) -> None:
    """A hundred and fifty tensors of one storage of 16 MiB."""
    held = {f"w{key}": tensor(storage(numel=number(2**22)), shape=many(number(2**22))) for key in range(150)}
    write(path, state(**held), {"a/data/0": bytes(2**24)})


def deep_model(path: Path) -> None:
    """A folder of Hugging Face's, whose configuration asks for ten million layers."""
    model = tiny_clip()
    path.mkdir()
    write_huggingface(model.config, model.state_dict(), path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 10_000_000
    (path / "config.json").write_text(json.dumps(config))


def named_layers(path: Path) -> None:
    """A state dict that has one tensor, the same, for each of fifty thousand layers; torch.save writes it."""
    one = torch.ones(16)
    held = dict(tiny_clip().visual.state_dict(prefix="visual."))
    held |= {name: value for name, value in tiny_clip().state_dict().items() if not name.startswith("visual.")}
    held |= {f"transformer.resblocks.{layer}.ln_1.weight": one for layer in range(2, 50_000)}
    held |= {name: torch.tensor(4) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(held, path)


def safetensors_of_many_dimensions(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**62] * 600_000, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def safetensors_of_many_lists(path: Path) -> None:
    header = b'{"w": [' + b"[]," * 2_000_000 + b"[]]}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def program(whole: bytes) -> Callable[[Path], object]:
    return lambda path: write(path, whole)


W = tensor()
DIMENSIONS = many(*[number(2**31 - 1)] * 300_000)
# The first word is what is done with it.
FILES: dict[str, Callable[[Path], object]] = {
    "read key of pairs": program(state(w=tensor(storage(doubling(60))))),
    "read shape of pairs": program(state(w=tensor(shape=doubling(60)))),
    "read stride of pairs": program(state(w=tensor(stride=doubling(60)))),
    "read number of elements of pairs": program(state(w=tensor(storage(numel=doubling(60))))),
    "read colliding keys": program(state(w=W, x=colliding(60_000))),
    "read 300,000 dimensions": program(state(w=tensor(shape=DIMENSIONS, stride=DIMENSIONS))),
    "read 300,000 dimensions of stride 0": program(
        state(w=tensor(shape=DIMENSIONS, stride=many(*[number(0)] * 300_000)))
    ),
    "read attributes again and again": program(state(w=W, x=rebuilt(100_000, 100_000))),
    "read many arguments": program(state(w=W, x=called(100_000, 300_000))),
    "read copies of a list": program(state(w=W, x=copied(400_000, 40_000))),
    "read a chain of modules": lambda path: write(
        path, START + chain(20_000) + STOP, {"a/constants.pkl": START + EMPTY + STOP}
    ),
    "read five million instructions": program(START + LIST * 5_000_000 + STOP),
    "read deflated pickle": lambda path: deflated(path, "a/data.pkl", zeros(1500), 1000),
    "read honest deflated pickle": lambda path: write(path, START + NONE * 2**27 + STOP, {}, zipfile.ZIP_DEFLATED),
    "read deflated storages": expanding_storages,
    "read overlapping storages": overlapping_storages,
    "read tied tensors": tied,
    "read safetensors of many dimensions": safetensors_of_many_dimensions,
    "read safetensors of many lists": safetensors_of_many_lists,
    "look prefix of prefixes": program(state(**{"module." * 600_000: W})),
    "inspect arguments of pairs": program(
        state(state_dict=DICT + text("model.w") + W + SETITEM, hyper_parameters=DICT + text("text_encoder") + NONE
              + SETITEM + text("x") + doubling(60) + SETITEM)
    ),
    "inspect epoch of pairs": program(
        state(state_dict=DICT + text("model.w") + W + SETITEM, epoch=doubling(60), hyper_parameters=DICT
              + text("text_encoder") + NONE + SETITEM)
    ),
    "look config of pairs": program(
        state(state_dict=DICT + text("model.w") + W + SETITEM, hyper_parameters=DICT + text("config") + DICT
              + text("image") + doubling(60) + SETITEM + SETITEM)
    ),
    "load ten million layers": deep_model,
    "load fifty thousand layers": named_layers,
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """What became of each file, and the MiB that it took."""
    folder = tmp_path_factory.mktemp("bounds")
    for name, make in FILES.items():
        make(folder / name)
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(SECONDS), *(str(folder / name) for name in FILES)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    return {name: (outcome, peak - start) for name, outcome, peak, start in found}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and limits of the address space")
@pytest.mark.parametrize("name", FILES)
def test_time_and_memory_are_bounded(outcomes: dict[str, tuple[str, int]], name: str) -> None:
    """Read or refused within 20 seconds of the processor and a gibibyte; not killed, and by no other error."""
    outcome, mebibytes = outcomes[name]
    assert outcome.startswith("refused: ") or outcome == "read"
    assert mebibytes < MIB, outcome
