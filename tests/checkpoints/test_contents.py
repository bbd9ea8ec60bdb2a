"""Files and folders that are no weights, or not all of them: each refused by a message that names it."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.checkpoints.by_hand import look, read_all, refusal, tiny_clip
from train_clip import load
from train_clip.checkpoints.huggingface import write_huggingface
from train_clip.checkpoints.read import DTYPES, EXPECTED, MAX_JSON
from train_clip.checkpoints.sources import read_contents

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs pipes, links and alarms")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No test here may wait: a pipe that is opened would block for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("over two minutes"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIP as Hugging Face has it."""
    model = tiny_clip()
    path = tmp_path / "model"
    path.mkdir()
    write_huggingface(model.config, model.state_dict(), path)
    return path


# What is no file of weights


def pictures() -> dict[str, bytes]:
    return {
        "empty": b"",
        "one byte": b"\x80",
        "text": b"no weights\n" * 10,
        "JSON": b'{"a": 1}',
        "HTML": b"<!DOCTYPE html>\n<html><body>404</body></html>",
        "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605247071\n",
        "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "gzip": b"\x1f\x8b\x08\0\0\0\0\0{" * 3,
        "a pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0}\x94.",
        "a pickle that calls": b"cos\nsystem\n(X\5\0\0\0touchtR.",
        "ELF": b"\x7fELF\2\1\1\0{",
        "zeros": bytes(1000),
        "an archive's first bytes": b"PK\3\4",
        "an archive of nothing": b"PK\5\6" + bytes(18),
        "UTF-16": "text".encode("utf-16"),
    }


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("name", pictures())
def test_what_is_no_file_of_weights(tmp_path: Path, name: str, suffix: str) -> None:
    """Whatever it is called: refused, by reading it alone and by loading it."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pictures()[name])
    message = refusal(path)
    assert refusal(path, load) == message
    if name == "empty" and suffix == ".pt":
        assert message == f"{path}: begins with b'', which no weights file does.{EXPECTED}"


def test_other_archives(tmp_path: Path) -> None:
    """NumPy's, which is a zip too; a picture; a shard of nothing."""
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    assert "0 entries data.pkl, expected one" in refusal(tmp_path / "a.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "begins with b'\\x89PNG" in refusal(tmp_path / "a.png")
    save_file({}, tmp_path / "a.safetensors")
    refusal(tmp_path / "a.safetensors", look)


def test_the_old_form_of_torch(tmp_path: Path) -> None:
    """Refused with a remedy, and the remedy, word for word, makes a file that is read."""
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"w": torch.arange(3.0)}, old, _use_new_zipfile_serialization=False)
    assert "torch.save(torch.load(FILE, weights_only=True), NEW)" in refusal(old)
    torch.save(torch.load(old, weights_only=True), new)
    assert torch.equal(read_all(new)["w"], torch.arange(3.0))


@pytest.mark.parametrize("kind", ["pipe", "nothing", "dangling link", "loop", "device", "socket folder", "long name"])
def test_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    """A pipe does not block; a link to nothing or to itself, a device, no file at all: refused by name."""
    path = tmp_path / "a.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket folder":
        path.mkdir()
    elif kind == "long name":
        path = tmp_path / ("a" * 300)
    message = refusal(path)
    assert "xpected" in message
    for expected in {
        "pipe": ["not a regular file"],
        "device": ["not a regular file"],
        "nothing": ["no such file"],
    }.get(kind, []):
        assert expected in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may read anything")
def test_no_permission(tmp_path: Path) -> None:
    """A file, or a folder around it, that may not be read."""
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").chmod(0)
    assert "ermission" in refusal(tmp_path / "a.pt")


# Configurations

ODD_JSON: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1, 2]",
    "a number": b"1",
    "null": b"null",
    "no text": b"\xff\xfe\xfd",
    "deep": b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "a number of many digits": b'{"a": ' + b"1" * 100_000 + b"}",
    "huge": b'{"a": "' + b" " * MAX_JSON + b'"}',
}


@pytest.mark.parametrize("name", ODD_JSON)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_json_that_is_none(folder: Path, file: str, name: str) -> None:
    """Huge, not JSON, not keys and values, deeply nested: the message names that file."""
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(ODD_JSON[name])
    assert str(folder / file) in refusal(folder, look)


def test_json_that_is_a_pipe(folder: Path) -> None:
    """A pipe in place of a configuration does not block: there is none."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "without config.json" in refusal(folder, look)


def test_a_stray_configuration_beside_a_file_that_needs_none(tmp_path: Path) -> None:
    """A run's own config.json, a list, beside a .safetensors file that says everything itself: it loads."""
    from train_clip.commands.convert import write_model

    write_model(tiny_clip(), tmp_path / "a.safetensors", "safetensors")
    (tmp_path / "config.json").write_text("[1, 2]")
    assert look(tmp_path / "a.safetensors").format == "train-clip safetensors"


# Models in several files


@pytest.mark.parametrize(
    "part", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "none.safetensors", "..", ".", "", "a\0b", "x" * 300]
)
def test_an_index_that_leads_elsewhere(folder: Path, part: str) -> None:
    """A path in place of a name, or a name of no file: refused, though the file it leads to is there and sound."""
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": part}}))
    refusal(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}},
                                   {"weight_map": {"a": None}}, {"weight_map": {"a": ["x"]}}])  # fmt: skip
def test_an_index_of_nothing(folder: Path, index: dict[str, Any]) -> None:
    """No files, or what is no name."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder)


def test_a_model_in_two_files(folder: Path) -> None:
    """The same tensors as in one file; without the second, with it damaged, or a pipe: refused, and the part named."""
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    names = list(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    places = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = read_all(folder)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    (folder / "two.safetensors").write_bytes(b"version https://git-lfs")
    assert "two.safetensors" in refusal(folder)
    (folder / "two.safetensors").unlink()
    assert "two.safetensors" in refusal(folder)
    os.mkfifo(folder / "two.safetensors")
    assert "two.safetensors" in refusal(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    """Says what it looked for."""
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "a folder without weights" in message
    assert "model.safetensors" in message


# safetensors


def header(entries: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


W = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
ODD_HEADERS = {
    "a length of 16 EiB": header({"w": W}, length=2**64 - 1),
    "a length beyond the file": header({"w": W}, length=1000),
    "a length of one more": header({"w": W}, length=len(json.dumps({"w": W})) + 17),
    "a length of none": header({"w": W}, length=0),
    "a length of less": header({"w": W}, length=10),
    "no JSON": header(b'{"w": {'),
    "no text": header(b'{"\xff": {}}'),
    "deep": header(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "a list": header(b'{"w":[]}'),
    "a list of all": header([1]),
    "a number": header(b"12"),
    "a tensor that is a number": header({"w": 1}),
    "a tensor without a type": header({"w": {"shape": [4], "data_offsets": [0, 16]}}),
    "a tensor without a shape": header({"w": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "a tensor without a place": header({"w": {"dtype": "F32", "shape": [4]}}),
    "a type that is none": header({"w": W | {"dtype": "F128"}}),
    "a type that is a list": header({"w": W | {"dtype": ["F32"]}}),
    "a type of 8 bits": header({"w": W | {"dtype": "F8_E4M3", "shape": [16]}}),
    "a shape of another size": header({"w": W | {"shape": [5]}}),
    "a shape that is a word": header({"w": W | {"shape": "4"}}),
    "a shape that is a number": header({"w": W | {"shape": 4}}),
    "a shape of floats": header({"w": W | {"shape": [4.0]}}),
    "a shape of words": header({"w": W | {"shape": ["4"]}}),
    "a shape of a truth": header({"w": W | {"shape": [True, 4]}}),
    "negative sizes": header({"w": W | {"shape": [-2, -2]}}),
    "a shape that overflows 64 bits": header({"w": W | {"shape": [2**32, 2**32]}}),
    "a shape that overflows to its size": header({"w": W | {"shape": [2**62 + 4, 1]}}),
    "a shape of huge numbers": header({"w": W | {"shape": [10**4000, 10**4000]}}),
    "a place beyond the file": header({"w": W | {"data_offsets": [4, 20]}}),
    "a place of negative offset": header({"w": W | {"data_offsets": [-16, 0]}}),
    "a place that ends before it begins": header({"w": W | {"data_offsets": [16, 0]}}),
    "a place of huge numbers": header({"w": W | {"data_offsets": [2**64, 2**64 + 16]}}),
    "a place of floats": header({"w": W | {"data_offsets": [0.0, 16.0]}}),
    "a place of three": header({"w": W | {"data_offsets": [0, 16, 32]}}),
    "a place of words": header({"w": W | {"data_offsets": ["0", "16"]}}),
    "overlapping places": header({"w": W, "v": W}),
    "places that overlap in part": header({"w": W, "v": W | {"data_offsets": [8, 24]}}, bytes(24)),
    "a gap": header({"w": W, "v": W | {"data_offsets": [20, 36]}}, bytes(36)),
    "data that belong to none": header({"w": W}, bytes(20)),
    "truncated": header({"w": W}, bytes(15)),
    "metadata that are a number": header({"__metadata__": 1, "w": W}),
    "metadata that are a list": header({"__metadata__": ["train_clip"], "w": W}),
    "metadata of a number": header({"__metadata__": {"train_clip": 1}, "w": W}),
    "metadata of a list": header({"__metadata__": {"train_clip": "[]"}, "w": W}),
    "metadata of no JSON": header({"__metadata__": {"train_clip": "{"}, "w": W}),
    "metadata of nothing": header({"__metadata__": {"train_clip": "null"}, "w": W}),
    "metadata of depth": header({"__metadata__": {"train_clip": "[" * 200_000}, "w": W}),
    "metadata of odd sizes": header({"__metadata__": {"train_clip": '{"image": {"blocks": 1}, "text": []}'}, "w": W}),
}  # fmt: skip


# What `train-clip inspect`, which reads no tensor, has to see by itself.
SEEN = (
    "a length beyond the file", "a type that is none", "a shape of another size", "a shape that overflows 64 bits",
    "a shape that overflows to its size", "a place beyond the file", "a place of negative offset",
    "a place that ends before it begins", "a place of huge numbers", "truncated",
)  # fmt: skip


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_odd_headers(tmp_path: Path, name: str) -> None:
    """Refused when it is told what it is, and when it is read, whether or not its name ends in .safetensors."""
    for path in (tmp_path / "a.safetensors", tmp_path / "a.bin"):
        path.write_bytes(ODD_HEADERS[name])
        refusal(path, look)
        if not name.startswith("metadata of"):
            refusal(path)
        if name in SEEN:
            refusal(path, read_contents)


def test_every_type_of_safetensors(tmp_path: Path) -> None:
    """Each type that has a name here, against the library's own reading."""
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for name, kind in DTYPES.items()}
    tensors |= {"none": torch.empty(0, 3), "scalar": torch.tensor(3.0), "nan": torch.tensor([float("nan"), -0.0])}
    save_file(tensors, tmp_path / "a.safetensors")
    found, loaded = read_all(tmp_path / "a.safetensors"), safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(found) == set(loaded)
    for name, tensor in loaded.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, equal_nan=True)
        assert read_contents(tmp_path / "a.safetensors").tensors[name].shape == tuple(tensor.shape)
