"""Files of embeddings: written and read by blocks, by this package, by plain NumPy and pyarrow."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from tests import forked
from train_clip.errors import MissingFile, UsageError, UserError
from train_clip.search import vectors

ENDINGS = (".parquet", ".npz", ".npy")
NUMBER, DIM = 500, 24
# What a file of names and captions may come across.
HOSTILE = ['"', "a,b", "tab\tnew\nline", "", " ", "ü 🐱 \u2028", "<img onerror=alert(1)>", "\\n", "=1+1", "x" * 3000]


def described(dtype: str, number: int = NUMBER, dim: int = DIM) -> dict[str, Any]:
    """The least that a file says of itself."""
    return {"version": 1, "fingerprint": "f", "dim": dim, "dtype": dtype, "number": number, "kind": "image"}


def write(path: Path, dtype: str = "float32", block: int = 128) -> tuple[np.ndarray, list[list[str]]]:
    """Write random rows with hostile texts, and return both."""
    matrix = np.random.default_rng(0).standard_normal((NUMBER, DIM)).astype(dtype)
    texts = [[f"{name}{row}{HOSTILE[row % len(HOSTILE)]}" for row in range(NUMBER)] for name in ("k", "p", "")]
    texts[2] = [HOSTILE[row % len(HOSTILE)] for row in range(NUMBER)]
    with vectors.writer(path, described(dtype)) as append:
        for first, end in pairwise([*range(0, NUMBER, block), NUMBER]):
            append(matrix[first:end], *(column[first:end] for column in texts))
    return matrix, texts


def plain(path: Path) -> tuple[np.ndarray, list[list[str]], Any]:
    """What libraries read of a file that know nothing of this package."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        matrix = np.array(table["embedding"].to_pylist(), table["embedding"].type.value_type.to_pandas_dtype())
        return matrix, [table[name].to_pylist() for name in vectors.TEXTS], table.schema.metadata[b"train_clip"]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            assert set(file) == {"embeddings", "key", "path", "caption", "about"}
            return file["embeddings"], [file[name].tolist() for name in vectors.TEXTS], file["about"].item()
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(mapped, np.memmap)
    return mapped, [[row[name] for row in rows] for name in vectors.TEXTS], path.with_suffix(".json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read(ending: str, dtype: str, tmp_path: Path) -> None:
    """By blocks of any size, and by libraries that know nothing of this package: every bit, every character."""
    path = tmp_path / f"x{ending}"
    matrix, texts = write(path, dtype)
    found, columns, about = plain(path)
    assert found.dtype == dtype and found.tobytes() == matrix.tobytes()
    assert columns == texts and json.loads(about) == described(dtype)
    opened = vectors.open_vectors(str(path))
    assert opened.about == described(dtype) and len(opened) == NUMBER
    for rows in (1, 77, 10_000):
        blocks = list(opened.blocks(rows))
        assert {block.dtype for block in blocks} == {np.dtype("float32")} and max(map(len, blocks)) <= rows
        np.testing.assert_array_equal(np.concatenate(blocks), matrix.astype(np.float32))
    assert [list(opened.keys), list(opened.paths), list(opened.captions)] == texts
    assert sorted(tmp_path.iterdir()) == sorted(vectors.files_of(path))


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_longest_captions_are_read(ending: str, tmp_path: Path) -> None:
    """Of 1 MiB, as long as captions may be; the limit that csv has for the whole process stays what it was."""
    path, before = tmp_path / f"x{ending}", csv.field_size_limit()
    longest = "x" * 2**20
    with vectors.writer(path, described("float32", 1)) as append:
        append(np.zeros((1, DIM)), ["k"], ["p"], [longest])
    assert list(vectors.open_vectors(path).captions) == [longest] and csv.field_size_limit() == before


@pytest.mark.parametrize("ending", [".npz", ".npy"])
def test_bytes_do_not_depend_on_blocks_or_time(ending: str, tmp_path: Path) -> None:
    for name, block in (("a", 7), ("b", 499)):
        write(tmp_path / f"{name}{ending}", block=block)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_rows(ending: str, tmp_path: Path) -> None:
    with vectors.writer(tmp_path / f"x{ending}", described("float32", 0)) as append:
        append(np.empty((0, DIM)), [], [], [])
    opened = vectors.open_vectors(tmp_path / f"x{ending}")
    assert (len(opened), list(opened.keys), sum(map(len, opened.blocks()))) == (0, [], 0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_is_complete_or_absent(ending: str, tmp_path: Path) -> None:
    """An error of who writes, too few rows, and blocks that do not fit."""
    path = tmp_path / f"x{ending}"
    for rows, columns in ((NUMBER, 3), (NUMBER - 1, 3), (NUMBER, 2)):
        with pytest.raises((ValueError, KeyError)), vectors.writer(path, described("float32")) as append:
            append(np.zeros((rows, DIM)), *[["a"] * rows] * columns)
            if rows == NUMBER:
                raise KeyError("a fault elsewhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_is_refused(ending: str, tmp_path: Path) -> None:
    """Cut anywhere, or of another length than it says: one message that names it, here or when it is read."""
    path = tmp_path / f"x{ending}"
    write(path)
    content = path.read_bytes()
    for end in (0, 10, 130, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=rf"x\{ending}: no embeddings .*damaged"):
            read_all(path)
    path.write_bytes(content)
    read_all(path)
    path.with_suffix(".csv").write_text("key,path,caption\na,b,c\n")
    path.with_suffix(".json").write_text(json.dumps(described("float32")))
    if ending == ".npy":
        with pytest.raises(UserError, match=r"1 of 500 in the column 'key'"):
            read_all(path)
        for wrong in ({"number": 7}, {"dim": 7}, {"dtype": "float16"}, {"version": 2}, {"kind": None}, {"number": -1}):
            path.with_suffix(".json").write_text(json.dumps(described("float32") | wrong))
            with pytest.raises(UserError, match="damaged"):
                read_all(path)


def read_all(path: Path) -> None:
    opened = vectors.open_vectors(path)
    assert sum(map(len, opened.blocks())) == len(opened.keys) == len(opened.captions) == NUMBER


def test_a_flipped_byte_in_npz_is_found(tmp_path: Path) -> None:
    write(tmp_path / "x.npz")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[20_000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged \(Bad CRC-32"):
        read_all(tmp_path / "x.npz")


def test_hostile_arrays_run_and_claim_nothing(tmp_path: Path) -> None:
    """Pickled objects, and headers that claim more than is there, are refused before any memory is taken."""
    write(tmp_path / "x.npy")
    for header in (
        "{'descr': '|O', 'fortran_order': False, 'shape': (500, 24), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (500, 24000000000), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (500, 24), }",
        "{'descr': '<U900000000', 'fortran_order': False, 'shape': (500,), }",
    ):
        file = io.BytesIO()
        file.write(np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header.encode())
        (tmp_path / "x.npy").write_bytes(file.getvalue() + b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(UserError, match="damaged"):
            read_all(tmp_path / "x.npy")


def test_what_is_no_file_of_embeddings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.csv: .* ends in \.parquet, \.npz, \.npy"):
        vectors.open_vectors(tmp_path / "x.csv")
    with pytest.raises(MissingFile, match=r"x\.npz: there is no such file"):
        vectors.open_vectors(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", data=np.zeros(3))
    parquet.write_table(pyarrow.table({"embedding": [1, 2]}), tmp_path / "x.parquet")
    for ending in (".npz", ".parquet"):
        with pytest.raises(UserError, match="no embeddings of this version"):
            vectors.open_vectors(tmp_path / f"x{ending}")


PEAK = """
import resource, sys
import numpy as np
from pathlib import Path
from train_clip.search import vectors

path, number, dim = Path(sys.argv[1]), 200_000, 512
import pyarrow.parquet
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
about = dict(version=1, fingerprint="f", dim=dim, dtype="float32", number=number, kind="image")
with vectors.writer(path, about) as append:
    for first in range(0, number, 1000):
        block = np.random.default_rng(first).standard_normal((1000, dim), np.float32)
        names = [f"{row:08}" for row in range(first, first + 1000)]
        append(block, [f"{name}.jpg" for name in names], names, [f"a photo of number {name}" for name in names])
written = peak()
total, opened = 0.0, vectors.open_vectors(path)
for block in opened.blocks():
    total += float(block[:, 0].sum(dtype=np.float64))
expected = sum(np.random.default_rng(first).standard_normal((1000, dim), np.float32)[:, 0].sum(dtype=np.float64)
               for first in range(0, number, 1000))
assert abs(total - expected) < 1e-6, (total, expected)
assert opened.captions[123_456] == "a photo of number 00123456"
print(written - before, peak() - before)
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_memory_is_bounded(ending: str, tmp_path: Path) -> None:
    """200,000 rows of 512, 410 MB: written and read with less than 130 MB, as the kernel counts it in a process."""
    result = forked.run(["-c", PEAK, str(tmp_path / f"x{ending}")], check=False)
    assert result.returncode == 0, result.stderr
    (tmp_path / f"x{ending}").unlink()
    print(ending, result.stdout)
    assert max(map(int, result.stdout.split())) < 130_000
