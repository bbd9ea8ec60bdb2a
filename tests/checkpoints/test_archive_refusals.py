"""Hostile pickles: each refused with a message that names the file, and nothing of it run."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import by_hand
from tests.checkpoints.by_hand import (
    BUILD,
    DICT,
    EMPTY,
    LIST,
    MARK,
    NEWOBJ,
    NONE,
    REDUCE,
    SETITEM,
    START,
    STOP,
    TUPLE1,
    TUPLE2,
    many,
    named,
    number,
    read_all,
    recall,
    refusal,
    state,
    storage,
    store,
    tensor,
    text,
    write,
)
from train_clip.checkpoints.sources import read_contents
from train_clip.errors import UserError

FORBIDDEN = (
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.getattr",
    "__builtin__.eval", "builtins.setattr", "builtins.__import__", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.serialization.load", "torch.utils.cpp_extension.load", "torch._utils._rebuild_tensor", "runpy.run_path",
    "importlib.import_module", "shutil.rmtree", "operator.methodcaller", "functools.partial", "copyreg._reconstructor",
    "tests.checkpoints.by_hand.write", "somebody.model.build", "torch.storage._load_from_bytes",
)  # fmt: skip


class Call:
    """Comes out of a pickle as the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def leave(marker: str) -> None:
    """A function of a user's module."""
    Path(marker).touch()


def test_nothing_is_run(tmp_path: Path) -> None:
    """Eight ways to make a file, each shown to make it when the archive's pickle is loaded by Python itself."""
    marker = tmp_path / "marker"
    word = str(marker)
    calls = [
        Call(os.system, f"touch {word}"),
        Call(subprocess.Popen, ["touch", word]),
        Call(subprocess.check_output, ["touch", word]),
        Call(builtins.eval, f"open({word!r}, 'w')"),
        Call(builtins.exec, f"open({word!r}, 'w')"),
        Call(builtins.open, word, "w"),
        Call(os.mkdir, word),
        Call(leave, word),
    ]
    for call in calls:
        if call.function is not leave:
            program = "import pickle, sys, time; pickle.load(sys.stdin.buffer); time.sleep(0.1)"
            subprocess.run([sys.executable, "-c", program], input=pickle.dumps(call, 2), check=False)
            assert marker.exists()
            marker.rmdir() if marker.is_dir() else marker.unlink()
        for held in (call, {"w": call}, [call]):
            refusal(write(tmp_path / "a.pt", pickle.dumps(held, 2)))
            assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "end"), [*((name, REDUCE) for name in FORBIDDEN), (FORBIDDEN[0], NEWOBJ), (FORBIDDEN[0], b"")]
)
def test_a_name_is_refused(tmp_path: Path, name: str, end: bytes) -> None:
    """Named and called, made, or only named: the message names the file and the name."""
    program = state(w=tensor(), x=named(name) + (many(text("touch marker")) + end if end else b""))
    assert name in refusal(write(tmp_path / "a.pt", program))


@pytest.mark.parametrize("name", ["torch.nn.modules.linear.Linear", "torch.nn.functional.relu"])
def test_a_whole_module(tmp_path: Path, name: str) -> None:
    """A pickled module is told from other code: the message says how to save its weights."""
    message = refusal(write(tmp_path / "a.pt", state(w=named(name) + EMPTY + NEWOBJ)))
    assert "whole pickled module" in message
    assert "torch.save(model.state_dict(), NEW)" in message


def test_torchs_own_whole_module(tmp_path: Path) -> None:
    """``torch.save(model)``, as torch itself writes it."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    assert "torch.save(model.state_dict(), NEW)" in refusal(tmp_path / "a.pt")


def test_a_name_that_is_let_through_is_never_imported(tmp_path: Path) -> None:
    """A class below a prefix that is let through comes out inert: its module, which leaves a marker, is not run."""
    package = tmp_path / "omegaconf"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    path = write(tmp_path / "a.pt", state(w=tensor(), x=named("omegaconf.Any") + many(NONE) + REDUCE + DICT + BUILD))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert set(read_all(path)) == {"w"}
        assert not (tmp_path / "marker").exists()
        __import__("omegaconf")
        assert (tmp_path / "marker").exists()
        del sys.modules["omegaconf"]


W = tensor()
SHAPE = DICT + text("shape") + many(number(10**9)) + SETITEM
ODD = {
    "a call of a word": text("os.system") + EMPTY + REDUCE,
    "a call of a tensor": W + EMPTY + REDUCE,
    "a call of a dict": DICT + EMPTY + REDUCE,
    "a call of a storage": storage() + EMPTY + REDUCE,
    "a call with a list": named("collections.OrderedDict") + LIST + REDUCE,
    "a call with a number": named("torch.Size") + number(3) + REDUCE,
    "a size of a number": named("torch.Size") + many(number(3)) + REDUCE,
    "a parameter of a word": named("torch._utils._rebuild_parameter") + many(text("x"), NONE, NONE) + REDUCE,
    "a parameter of nothing": named("torch._utils._rebuild_parameter") + EMPTY + REDUCE,
    "attributes of a function": named("torch._utils._rebuild_tensor_v2") + DICT + BUILD,
    "attributes of a class": named("__torch__.M") + SHAPE + BUILD,
    "attributes of a class in slots": named("__torch__.M") + NONE + SHAPE + TUPLE2 + BUILD,
    "attributes of a function in slots": named("torch._utils._rebuild_tensor_v2") + NONE + SHAPE + TUPLE2 + BUILD,
    "another shape for a tensor": W + SHAPE + BUILD,
    "another shape for a tensor in slots": W + NONE + SHAPE + TUPLE2 + BUILD,
    "another size for a storage": storage() + DICT + text("numel") + number(9) + SETITEM + BUILD,
    "a stand-in as a key": DICT + named("__torch__.M") + EMPTY + NEWOBJ + NONE + SETITEM,
    "a tuple as a key by the memo": EMPTY + store(1) + DICT + recall(1) + NONE + SETITEM,
    "ten thousand names": LIST + MARK + b"".join(named(f"__torch__.M{index}") for index in range(10_001)) + b"e",
    "attributes of a list": LIST + DICT + BUILD,
    "attributes of a tensor": W + DICT + BUILD,
    "attributes of a word": text("x") + DICT + BUILD,
    "a list of ints of a number": named("torch.jit._pickle.build_intlist") + many(number(1)) + REDUCE,
    "items of a tensor": W + text("a") + NONE + SETITEM,
    "items of a list": LIST + text("a") + NONE + SETITEM,
    "an item of a dict": DICT + NONE + b"a",
    "a key that is a tuple": DICT + EMPTY + NONE + SETITEM,
    "a key that is a list": DICT + LIST + NONE + SETITEM,
    "a key that is a dict": DICT + DICT + NONE + SETITEM,
    "a key that is a tensor": DICT + W + NONE + SETITEM,
    "a key without a value": DICT + MARK + text("a") + b"u",
    "a mark that is not there": b"t",
    "a memo that is not there": recall(9),
    "a stack that is empty": b"\x87",
    "nothing to remember": START + b"q\0",
    "a tensor of no storage": tensor(text("0")),
    "a tensor of another tensor": tensor(W),
    "a tensor of too few arguments": named("torch._utils._rebuild_tensor_v2") + many(storage()) + REDUCE,
    "a tensor of shape and no strides": tensor(stride=EMPTY),
    "a tensor of strides and no shape": tensor(shape=EMPTY),
    "a shape that is a number": tensor(shape=number(4)),
    "a shape of words": tensor(shape=many(text("4"))),
    "a shape of floats": tensor(shape=many(b"G" + struct.pack(">d", 2.0))),
    "a shape of None": tensor(shape=many(NONE)),
    "a negative size": tensor(shape=many(number(-4))),
    "two negative sizes": tensor(shape=many(number(-2), number(-2)), stride=many(number(1), number(1))),
    "a negative stride": tensor(stride=many(number(-1))),
    "a negative offset": tensor(offset=number(-1)),
    "an offset that is a word": tensor(offset=text("0")),
    "an offset out of the storage": tensor(offset=number(1)),
    "a huge offset": tensor(offset=number(2**63)),
    "a stride out of the storage": tensor(stride=many(number(2))),
    "a huge stride": tensor(shape=many(number(2)), stride=many(number(2**64 - 1))),
    "a stride of 0 and 10¹² elements": tensor(shape=many(number(10**12)), stride=many(number(0))),
    "strides of 0 in two dimensions": tensor(shape=many(number(10**6), number(10**6)), stride=many(*[number(0)] * 2)),
    "a stride of 0 and one element too many": tensor(shape=many(number(5)), stride=many(number(0))),
    "a product beyond 64 bits": tensor(shape=many(number(2**32), number(2**32)), stride=many(*[number(0)] * 2)),
    "a storage of more elements": tensor(storage(numel=number(5))),
    "a storage of fewer elements": tensor(storage(numel=number(3)), shape=many(number(3))),
    "a storage of negative size": tensor(storage(numel=number(-4))),
    "a storage of a huge size": tensor(storage(numel=number(2**62))),
    "a storage whose size is a word": tensor(storage(numel=text("4"))),
    "a storage whose size is a list": tensor(storage(numel=LIST)),
    "a storage of another type": tensor(storage(kind="torch.DoubleStorage")),
    "a storage of no type": tensor(storage(kind="torch.NoStorage")),
    "a storage of a type that is none": tensor(storage(kind="torch.evil")),
    "a storage that is not there": tensor(storage(text("1"))),
    "a storage outside": tensor(storage(text("../../data/0"))),
    "a storage of too few words": many(text("storage"), named("torch.FloatStorage")) + by_hand.PERSISTENT,
    "a storage that is a word": text("storage") + by_hand.PERSISTENT,
    "a storage that is no pair": NONE + by_hand.PERSISTENT,
    "bytes of 8 EiB": b"\x8e" + struct.pack("<Q", 2**63 - 1),
    "an array of 8 EiB": b"\x96" + struct.pack("<Q", 2**63 - 1),
    "bytes of 16 EiB": b"\x8e" + struct.pack("<Q", 2**64 - 1),
    "a word of 4 GiB": b"X" + struct.pack("<I", 2**32 - 1),
    "a word of 8 EiB": b"\x8d" + struct.pack("<Q", 2**63 - 1),
    "a number of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a number of negative length": b"\x8b" + struct.pack("<i", -1),
    "a frame of 8 EiB": b"\x95" + struct.pack("<Q", 2**63 - 1),
    "a name of no ASCII": "cös\nsystem\n".encode(),
    "a name without an end": b"cos",
    "a word of no UTF-8": b"X\1\0\0\0\xff",
    "an extension": b"\x82\1",
    "an instance": MARK + b"ios\nsystem\n",
    "an object": MARK + named("collections.OrderedDict") + b"o",
    "a name off the stack": text("os") + text("system") + b"\x93",
    "a persistent name": b"Pname\n",
    "an instruction that is none": b"\xff",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_programs(tmp_path: Path, name: str) -> None:
    """Beside a sound tensor, whatever it is: refused before a tensor is read, and the file named."""
    assert set(read_all(write(tmp_path / "a.pt", state(w=W)))) == {"w"}
    refusal(write(tmp_path / "a.pt", state(w=W, x=ODD[name])), read_contents)


@pytest.mark.parametrize(
    "program", [b"", START, STOP, START + STOP, START + DICT, b"\x80\xff" + DICT + STOP, b"\x80\x04" + DICT + STOP]
)
def test_programs_without_an_end_or_a_result(tmp_path: Path, program: bytes) -> None:
    """Cut short, without data, of another protocol: refused."""
    refusal(write(tmp_path / "a.pt", program))


@pytest.mark.parametrize("held", [LIST, EMPTY, NONE, number(1), text("a"), W, named("torch.float32"), DICT])
def test_what_holds_no_weights(tmp_path: Path, held: bytes) -> None:
    """Plain data that is no dict of tensors, or a dict of none: the message says what was expected."""
    assert "xpected" in refusal(write(tmp_path / "a.pt", START + held + STOP))


@pytest.mark.parametrize("place", [0, 255, 2**20, 2**31, 2**32 - 1])
def test_a_memo_of_any_place(tmp_path: Path, place: int) -> None:
    """A huge index costs nothing: it is refused, since Python's own unpickler would take gigabytes for it."""
    path = write(tmp_path / "a.pt", state(w=W, x=NONE + store(place), y=recall(place)))
    if place < 2**31:
        assert set(read_all(path)) == {"w"}
    else:
        assert "instructions or memo entries" in refusal(path)


def test_itself(tmp_path: Path) -> None:
    """Lists and dicts that hold themselves, beside sound weights: the weights, or a refusal."""
    loops = [LIST + store(1) + recall(1) + b"a", DICT + store(1) + text("a") + recall(1) + SETITEM]
    for loop in loops:
        assert set(read_all(write(tmp_path / "a.pt", state(w=W, x=loop)))) == {"w"}
    # The state dict of which is the file itself.
    program = START + DICT + store(1) + text("state_dict") + recall(1) + SETITEM + text("w") + W + SETITEM + STOP
    assert set(read_all(write(tmp_path / "a.pt", program))) == {"w"}


def test_a_module_that_is_a_part_of_itself(tmp_path: Path) -> None:
    """A script whose modules form a ring: refused in place of walked for ever."""
    program = (
        START + named("__torch__.M") + EMPTY + NEWOBJ + store(1) + DICT + text("a") + recall(1) + SETITEM + BUILD + STOP
    )
    path = write(tmp_path / "a.pt", program, {"a/constants.pkl": START + EMPTY + STOP})
    assert "part of itself" in refusal(path)


def test_tensors_under_names_that_are_no_words(tmp_path: Path) -> None:
    """Numbers and None as names, as an optimizer's state has them: refused by the message for unknown weights."""
    torch.save({0: torch.ones(2), 1: torch.ones(3), None: torch.ones(1)}, tmp_path / "a.pt")
    refusal(tmp_path / "a.pt", by_hand.look)


@pytest.mark.parametrize("where", ["value", "key", "shape", "attributes", "storage"])
def test_tuples_deep_in_one_another(tmp_path: Path, where: str) -> None:
    """300,000: data as a value, passed over as attributes; as a key, a size or a name refused, without a crash."""
    nest = EMPTY + TUPLE1 * 300_000
    program = {
        "value": state(w=W, x=nest),
        "key": state(w=W, x=DICT + nest + NONE + SETITEM),
        "shape": state(w=tensor(shape=nest)),
        "attributes": state(w=W, x=named("__torch__.M") + nest + NEWOBJ + nest + BUILD),
        "storage": state(w=tensor(storage(key=nest))),
    }[where]
    path = write(tmp_path / "a.pt", program)
    if where in ("value", "attributes"):
        assert set(read_all(path)) == {"w"}
    else:
        refusal(path)


def test_a_view_whose_signs_are_changed(tmp_path: Path) -> None:
    """PyTorch writes its numbers as they are and a mark beside them, without which each has the other sign."""
    turned = torch.ones(2, dtype=torch.complex64).conj().imag
    assert turned.is_neg()
    torch.save({"a": turned}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt.*sign changed.*clone"):
        read_contents(tmp_path / "weights.pt")
