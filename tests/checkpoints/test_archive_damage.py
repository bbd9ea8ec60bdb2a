"""Damaged archives, and files that are none: the tensors that were written, or a refusal that names the file."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from tests.checkpoints.by_hand import DICT, STOP, named, read_all, refusal, state, storage, tensor, text, write
from train_clip.errors import UserError

WRITTEN = {"w": torch.arange(4.0), "narrow": torch.arange(6.0).half().reshape(2, 3), "n": torch.tensor([1, 2])}


def saved() -> bytes:
    file = io.BytesIO()
    torch.save(WRITTEN, file)
    return file.getvalue()


def scripted() -> bytes:
    module = torch.nn.Module()
    for name, value in WRITTEN.items():
        module.register_buffer(name, value)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    return file.getvalue()


KINDS = {"torch.save": saved, "TorchScript": scripted, "safetensors": lambda: save(WRITTEN)}


def assert_as_written_or_refused(path: Path) -> bool:
    """Whether it was read; then every tensor is the one that was written. Anything but a ``UserError`` raises."""
    try:
        found = read_all(path)
    except UserError as error:
        assert str(path) in str(error)
        return False
    for name, value in found.items():
        assert torch.equal(value, as_here(WRITTEN[name]))
    assert set(found) == set(WRITTEN)
    return True


def as_here(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def flips(content: bytes, each: int) -> Iterator[tuple[int, bytes]]:
    """Every byte inverted, and every bit of each n-th byte flipped."""
    for place in range(len(content)):
        for mask in [255] + [1 << bit for bit in range(8) if place % each == 0]:
            damaged = bytearray(content)
            damaged[place] ^= mask
            yield place, bytes(damaged)


def used(content: bytes) -> set[int]:
    """The places of an archive that are headers, the directory, its end, or the pickle, storages and byte order."""
    places = set(range(content.index(b"PK\1\2"), len(content)))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset
            name, extra = struct.unpack("<HH", content[start + 26 : start + 30])
            data = start + 30 + name + extra
            if entry.filename.endswith(("data.pkl", "byteorder")) or "/data/" in entry.filename:
                places |= set(range(start, start + 30 + name)) | set(range(data, data + entry.compress_size))
    return places


@pytest.mark.parametrize("kind", ["torch.save", "TorchScript"])
def test_every_byte_flipped(tmp_path: Path, kind: str) -> None:
    """Each byte that is read, all bits of every third: as written or refused. A flip in the data itself is refused."""
    content, path = KINDS[kind](), tmp_path / "a.pt"
    places = used(content)
    failed = []
    for place, damaged in flips(content, 3):
        if place not in places:
            continue
        path.write_bytes(damaged)
        try:
            assert_as_written_or_refused(path)
        except Exception as error:
            failed.append((place, damaged[place], content[place], f"{type(error).__name__}: {error}"[:80]))
    assert not failed, (len(failed), failed[:20])


def test_every_byte_of_the_numbers_flipped(tmp_path: Path) -> None:
    """One bit of each byte of the pickle and of the storages: refused, by the checksum."""
    content, path = saved(), tmp_path / "a.pt"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        held = [
            archive.read(entry)
            for entry in archive.infolist()
            if entry.filename.endswith("data.pkl") or "/data/" in entry.filename
        ]
    assert len(held) == 1 + len(WRITTEN)
    for part in held:
        start = content.index(part)
        for place in range(start, start + len(part)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            assert not assert_as_written_or_refused(path)


def test_a_flip_in_the_header_of_safetensors(tmp_path: Path) -> None:
    """Every bit of the header: refused, or tensors of other names, types or shapes; never another kind of error."""
    content, path = save(WRITTEN), tmp_path / "a.safetensors"
    end = 8 + int.from_bytes(content[:8], "little")
    failed = []
    for place, damaged in flips(content[:end], 1):
        path.write_bytes(damaged + content[end:])
        try:
            read_all(path)
        except UserError as error:
            assert str(path) in str(error)
        except Exception as error:
            failed.append((place, damaged[place], content[place], f"{type(error).__name__}: {error}"[:80]))
    assert not failed, (len(failed), failed[:20])


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation(tmp_path: Path, kind: str) -> None:
    """Each seventh length, and every one near the beginning and the end: refused."""
    content, path = KINDS[kind](), tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    path.write_bytes(content)
    assert assert_as_written_or_refused(path)
    for length in {*range(0, len(content), 7), *range(60), *range(len(content) - 60, len(content))}:
        path.write_bytes(content[:length])
        refusal(path)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    place=st.floats(0, 1, exclude_max=True),
    new=st.binary(max_size=12),
    removed=st.integers(0, 12),
)
def test_other_bytes(
    kind: str, place: float, new: bytes, removed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A few bytes replaced, added or removed anywhere: read or refused, no other error."""
    content, path = KINDS[kind](), tmp_path_factory.getbasetemp() / "other.pt"
    start = int(place * len(content))
    path.write_bytes(content[:start] + new + content[start + removed :])
    try:
        read_all(path)
    except UserError as error:
        assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(program=st.binary(max_size=60))
def test_random_programs(program: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random instructions before and after a sound tensor: read or refused, no other error."""
    path = tmp_path_factory.getbasetemp() / "random.pt"
    for whole in (b"\x80\x02" + program + STOP, b"\x80\x02" + DICT + text("w") + tensor() + b"s" + program + STOP):
        write(path, whole)
        try:
            read_all(path)
        except UserError as error:
            assert str(path) in str(error)


def test_entries_that_are_wrong(tmp_path: Path) -> None:
    """No pickle, two of them, the other byte order, a storage of another size, and an entry that is there twice."""
    sound, numbers = state(w=tensor()), struct.pack("<4f", 1, 2, 3, 4)
    assert "byte order" in refusal(write(tmp_path / "a.pt", sound, {"a/data/0": numbers, "a/byteorder": b"big"}))
    refusal(write(tmp_path / "a.pt", sound, {"a/data/0": numbers, "a/byteorder": b""}))
    assert "2 entries data.pkl" in refusal(write(tmp_path / "a.pt", sound, {"a/data/0": numbers, "b/data.pkl": sound}))
    assert "a/data/0" in refusal(write(tmp_path / "a.pt", sound, {"a/data/0": numbers[:-1]}))
    assert "a/data/0" in refusal(write(tmp_path / "a.pt", sound, {"a/data/0": numbers + b"\0"}))
    assert "a/data/0" in refusal(write(tmp_path / "a.pt", sound, {}))
    assert "a/data/0" in refusal(write(tmp_path / "a.pt", sound, {"b/data/0": numbers}))
    for name in ("a/b.pkl", "data.pkl", "a/b/data.pkl", "/data.pkl/", "a/DATA.PKL"):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr(name, sound)
        assert "0 entries data.pkl" in refusal(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ["a/data.pkl", "a/data/0"])
def test_an_entry_that_is_there_twice(tmp_path: Path, name: str) -> None:
    """Readers differ in which they take, so what one checked another would load: refused."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", state(w=tensor(), v=tensor()))
        archive.writestr("a/data/0", bytes(16))
        archive.writestr(name, state(w=tensor()) if name.endswith("pkl") else b"1" * 16)
    refusal(tmp_path / "a.pt")


def with_directory(path: Path, name: str, **fields: int) -> Path:
    """Change what the directory says of an entry: its method, its checksum, its two sizes."""
    content = bytearray(path.read_bytes())
    start = next(
        place
        for place in range(len(content))
        if content[place : place + 4] == b"PK\1\2" and content[place + 46 :].startswith(name.encode())
    )
    places = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "packed": (20, "<I"), "size": (24, "<I")}
    for field, value in fields.items():
        offset, form = places[field]
        struct.pack_into(form, content, start + offset, value)
    path.write_bytes(content)
    return path


LIES = {
    "fewer bytes than it says": {"packed": 12, "crc": zlib.crc32(struct.pack("<3f", 1, 2, 3))},
    "no whole numbers": {"packed": 15, "crc": zlib.crc32(struct.pack("<4f", 1, 2, 3, 4)[:15])},
    "no bytes": {"packed": 0, "crc": 0},
    "more bytes than the file has": {"packed": 2**31},
    "deflated, and it is not": {"method": 8},
    "bzip2, and it is not": {"method": 12},
    "lzma, and it is not": {"method": 14},
    "a method that is none": {"method": 99},
    "encrypted": {"flags": 1},
    "another checksum": {"crc": 1},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["a/data/0", "a/data.pkl"])
def test_a_directory_that_lies(tmp_path: Path, lie: str, name: str) -> None:
    """What the directory says of the storage, or of the pickle, is not so, its checksum set right: refused.

    More bytes than it has are not read, so what was written may come out.
    """
    path = write(tmp_path / "a.pt", state(w=tensor()))
    assert set(read_all(path)) == {"w"}
    with_directory(path, name, **LIES[lie])
    if lie != "more bytes than the file has" or not assert_numbers(path):
        refusal(path)


def assert_numbers(path: Path) -> bool:
    """Whether it is read; then to the numbers of ``write``."""
    try:
        found = read_all(path)
    except UserError:
        return False
    assert torch.equal(found["w"], torch.tensor([1.0, 2, 3, 4]))
    return True


def test_two_types_of_one_storage(tmp_path: Path) -> None:
    """One storage as float32 and as int32: as torch.load takes it, or refused."""
    path = write(tmp_path / "a.pt", state(w=tensor(), v=tensor(storage(kind="torch.IntStorage"))))
    try:
        found = read_all(path)
    except UserError:
        return
    loaded = torch.load(path, weights_only=True)
    assert all(torch.equal(found[name], loaded[name]) for name in loaded)


def test_names_with_a_blank_in_place_of_a_dot(tmp_path: Path) -> None:
    """``torch _utils._rebuild_tensor_v2`` is the same function to Python; it is read or refused, and that is all."""
    held = tensor().replace(named("torch._utils._rebuild_tensor_v2"), b"ctorch\n_utils._rebuild_tensor_v2\n")
    path = write(tmp_path / "a.pt", state(w=held))
    assert set(read_all(path)) == {"w"}
