"""Arrays in place of images: what is read of them, that they are cropped as the images are, and what they cannot do."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from PIL import Image

from train_clip.data.arrays import MAX_DATA, read_array, write_array
from train_clip.data.crops import read_picture, resize_shorter
from train_clip.data.pairs import Pair
from train_clip.data.samples import Skip, TrainingPairs, ValidationPairs, collate, image_loader
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import BadSample, UserError

SIZE = 16


@pytest.fixture
def cached(tmp_path: Path, noise: Callable[..., Image.Image]) -> tuple[list[Pair], list[Pair]]:
    """Five pairs of noise, wide, tall and square, read from their images and read from arrays of them."""
    plain, with_cache = [], []
    for index, (width, height) in enumerate([(40, 30), (30, 41), (33, 33), (SIZE, 50), (15, 20)]):
        image, caption, array = (tmp_path / f"{index}.{suffix}" for suffix in ("png", "txt", "npz"))
        noise(width, height, index).save(image)
        caption.write_text(f"first of {index}\nsecond of {index}\n")
        with Image.open(image) as picture:
            np.savez(array, data=np.asarray(resize_shorter(picture, SIZE)).transpose(2, 0, 1))
        plain.append(Pair(str(image), str(caption)))
        with_cache.append(Pair(str(image), str(caption), cache=str(array)))
    return plain, with_cache


def npz(path: Path, data: Any, **others: Any) -> str:
    np.savez(path, data=data, **others)
    return str(path)


def picture(side: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, side, side + seed), dtype=np.uint8)


def normalised(seed: int = 0, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, SIZE, SIZE)).astype(dtype)


def numbered(tmp_path: Path, arrays: list[np.ndarray]) -> list[Pair]:
    """A pair for each array, whose image is the array."""
    pairs = []
    for index, array in enumerate(arrays):
        (tmp_path / f"{index}.txt").write_text(f"array {index}\n")
        pairs.append(Pair(npz(tmp_path / f"{index}.npz", array), str(tmp_path / f"{index}.txt")))
    return pairs


def test_a_random_crop_of_an_array_is_that_of_its_image(cached: tuple[list[Pair], list[Pair]]) -> None:
    """The paper's crop and caption for 5 pairs in 6 epochs, with and without arrays: the same window and words."""
    # To within what two bicubics differ by on noise; a window that is a pixel off is some 60 levels off on average.
    plain, with_cache = (TrainingPairs(pairs, SIZE, None, 3) for pairs in cached)
    seen = set()
    for key in [(epoch, index) for epoch in range(6) for index in range(5)]:
        expected, found = plain[key], with_cache[key]
        assert found.pixels.dtype == torch.uint8
        difference = (found.pixels.int() - expected.pixels.int()).abs()
        assert difference.float().mean() < 0.5
        assert difference.max() <= 12
        assert found.caption == expected.caption
        seen.add((key[1], found.pixels.numpy().tobytes()))
    # The square picture has one crop; the others are not frozen.
    assert len(seen) > 15


def test_the_centre_crop_of_an_array_is_that_of_its_image(cached: tuple[list[Pair], list[Pair]]) -> None:
    """Validation and scoring with arrays, against Pillow's resize and crop of the images here: the same bytes."""
    plain, with_cache = cached
    validation = ValidationPairs(with_cache, SIZE)
    scored = image_loader([pair.pixels for pair in with_cache], SIZE, 1, 0)
    for index, (pair, (_, (pixels,), _)) in enumerate(zip(plain, scored, strict=True)):
        with Image.open(pair.image) as image:
            factor = SIZE / min(image.size)
            wide, high = (SIZE if side == min(image.size) else int(side * factor + 1e-9) for side in image.size)
            left, top = round((wide - SIZE) / 2), round((high - SIZE) / 2)
            cropped = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
        expected = np.asarray(cropped).transpose(2, 0, 1)
        assert np.array_equal(validation[index].pixels, expected)
        assert np.array_equal(pixels, expected)


def test_squares_are_resized_out_of_arrays(tmp_path: Path) -> None:
    """``resize_ratio``: share and place drawn here by the same generator, cut out, resized by Pillow, to within 12."""
    array = np.random.default_rng(1).integers(0, 256, (3, SIZE, 40), dtype=np.uint8)
    pairs = numbered(tmp_path, [array, array])
    data = TrainingPairs(pairs, SIZE, 0.3, 7)
    for epoch in range(5):
        rng = np.random.default_rng((7, epoch, 1))
        rng.integers(1)  # the caption
        side = round(SIZE * np.sqrt(rng.uniform(0.3, 1.0)))
        left, top = int(rng.integers(40 - side + 1)), int(rng.integers(SIZE - side + 1))
        cut = np.ascontiguousarray(array[:, top : top + side, left : left + side].transpose(1, 2, 0))
        expected = Image.fromarray(cut).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        difference = data[epoch, 1].pixels.numpy().astype(int) - np.asarray(expected).transpose(2, 0, 1)
        assert np.abs(difference).mean() < 0.5
        assert np.abs(difference).max() <= 12


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, dtype: Any, save: Any, order: Any) -> None:
    """Stored and deflated, in either order, with another array beside: against numpy.load."""
    array = np.asarray(np.random.default_rng(0).uniform(0, 255, (3, 5, 9)).astype(dtype), order=order)
    save(tmp_path / "a.npz", other=np.arange(4), data=array)
    found, expected = read_array(str(tmp_path / "a.npz")), np.load(tmp_path / "a.npz")["data"]
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_what_is_written_numpy_reads(tmp_path: Path) -> None:
    """numpy.load gives the array back; writing it again gives the same bytes, so that equal images have equal files."""
    array = picture().transpose(0, 2, 1)
    for name in ("a.npz", "b.npz"):
        write_array(tmp_path / "npz" / name, array)
    assert np.array_equal(np.load(tmp_path / "npz" / "a.npz")["data"], array)
    assert (tmp_path / "npz" / "a.npz").read_bytes() == (tmp_path / "npz" / "b.npz").read_bytes()
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_normalised_pixels_are_passed_on_as_they_are(tmp_path: Path, dtype: Any) -> None:
    """The fork's files in training (any epoch), validation, scoring and a batch: the array's values, as float32."""
    arrays = [normalised(seed, dtype) for seed in range(3)]
    pairs = numbered(tmp_path, arrays)
    training, validation = TrainingPairs(pairs, SIZE, None, 0), ValidationPairs(pairs, SIZE)
    for index, array in enumerate(arrays):
        for sample in (training[0, index], training[5, index], validation[index]):
            assert sample.pixels.dtype == torch.float32
            assert np.array_equal(sample.pixels.numpy(), array.astype(np.float32))
    batch = collate(Tokenizer(), [training[0, index] for index in range(3)])
    assert batch.images.dtype == torch.float32
    ((_, pixels, _),) = image_loader([pair.pixels for pair in pairs], SIZE, 3, 0)
    assert np.array_equal(pixels.numpy(), np.stack(arrays).astype(np.float32))


def test_a_place_is_held_in_the_dtype_of_the_others(tmp_path: Path) -> None:
    """A held-out array that cannot be read leaves float zeros, which stack with float pixels; the first may be bad."""
    pairs = numbered(tmp_path, [normalised(seed) for seed in range(3)])
    Path(pairs[0].image).write_bytes(b"")
    sample = ValidationPairs(pairs, SIZE)[0]
    assert sample.missing
    assert sample.pixels.dtype == torch.float32
    assert sample.skips == (Skip(pairs[0].image, "empty file"),)


@pytest.mark.parametrize("first", [0, 1])
def test_both_kinds_in_one_list_are_refused(tmp_path: Path, first: int) -> None:
    """Pictures and normalised pixels, whichever comes first: training, validation and scoring name one of each."""
    pairs = numbered(tmp_path, [picture(), normalised()] if first == 0 else [normalised(), picture()])
    for read in (
        lambda: TrainingPairs(pairs, SIZE, None, 0)[0, 1],
        lambda: ValidationPairs(pairs, SIZE)[1],
        lambda: list(image_loader([pair.pixels for pair in pairs], SIZE, 1, 0)),
    ):
        with pytest.raises(UserError) as refused:
            read()
        for file, kind in ((first, "a picture"), (1 - first, "already normalized")):
            assert re.search(f"{tmp_path}/{file}.npz:? holds {kind}", str(refused.value))


def test_an_array_for_another_model_stops(tmp_path: Path) -> None:
    """Of another size, as the first of a list and as a later one: a stop that says how to make it anew, no skip."""
    pairs = numbered(tmp_path, [picture(SIZE), picture(SIZE + 4), normalised()])
    remedy = r"1.npz: was made for another model: it has \d+×\d+ pixels.*train-clip data npz FOLDER --image_size 16"
    with pytest.raises(UserError, match=remedy):
        TrainingPairs(pairs[1:], SIZE, None, 0)
    with pytest.raises(UserError, match=remedy):
        TrainingPairs(pairs, SIZE, 0.5, 0)[0, 1]
    with pytest.raises(UserError, match=r"2.npz: was made for.*16×16 pixels; expected 32 .*32×32 if"):
        ValidationPairs(pairs[2:], 32)


def test_pictures_to_look_at(tmp_path: Path) -> None:
    """Bytes come back as they are; normalised pixels by their own least and greatest value, and it is said."""
    array = picture()
    shown, mended = read_picture(npz(tmp_path / "a.npz", array))
    assert np.array_equal(np.asarray(shown), array.transpose(1, 2, 0))
    assert mended == ()
    floats = (array / 255 - 0.45) / 0.25
    shown, mended = read_picture(npz(tmp_path / "b.npz", floats.astype(np.float32)))
    assert np.abs(np.asarray(shown).astype(int) - array.transpose(1, 2, 0)).max() <= 2
    assert mended == ("already normalized pixels, used unchanged, without a crop",)


def header(shape: object, descr: str = "|u1", fortran_order: bool = False, version: int = 1) -> bytes:
    """An array's header by hand."""
    text = str({"descr": descr, "fortran_order": fortran_order, "shape": shape}).encode() + b"\n"
    return npy.MAGIC_PREFIX + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


def zipped(content: bytes, name: str = "data.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of one entry."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def saved(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def claims(content: bytes, size: int) -> bytes:
    """A zip whose directory says its entry to be of another size, packed and unpacked."""
    at = content.rfind(b"PK\1\2")
    return content[: at + 20] + size.to_bytes(4, "little") * 2 + content[at + 28 :]


def many(number: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for index in range(number):
            archive.writestr(f"{index}.npy", b"")
    return stream.getvalue()


def _plain_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, picture())
    return stream.getvalue()


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("something was unpickled",)


SHAPE = "npz with another shape than (3, height, width)"
SIDES = "a side below 2 pixels or an aspect ratio above 100"
NO_ZIP = "not an npz file, or a truncated one"
LIES = "npz whose array does not have the size in its header"
HUGE = (3, 2**31, 2**31)
HOSTILE = {
    "empty": (b"", "empty file"),
    "no zip": (b"GIF89a" * 20, NO_ZIP),
    "an npy file": (_plain_npy(), NO_ZIP),
    "cut short": (saved(data=picture())[:-30], NO_ZIP),
    "cut within the data": (saved(data=picture())[:300], NO_ZIP),
    "no array of that name": (saved(image=picture()), "npz without the array 'data'"),
    "no array at all": (saved(), "npz without the array 'data'"),
    "objects": (saved(data=np.array([Bomb()] * 3, dtype=object)), "npz of dtype |O; expected"),
    "objects in fields": (saved(data=np.zeros(3, dtype=[("a", object)])), "npz of dtype |V8; expected"),
    "float64": (saved(data=np.zeros((3, 4, 4))), "npz of dtype <f8; expected uint8, float16 or float32"),
    "big-endian": (saved(data=np.zeros((3, 4, 4), ">f4")), "npz of dtype >f4; expected uint8, float16 or float32"),
    "fields": (saved(data=np.zeros(3, dtype="u1,u1")), "npz of dtype |V2; expected uint8, float16 or float32"),
    "channels last": (saved(data=picture().transpose(1, 2, 0)), SHAPE),
    "a stack": (saved(data=picture()[None]), SHAPE),
    "a number": (saved(data=np.uint8(3)), SHAPE),
    "a row": (saved(data=np.zeros((3, 1, 9), np.uint8)), SIDES),
    "a long strip": (saved(data=np.zeros((3, 2, 202), np.uint8)), SIDES),
    "nothing": (saved(data=np.zeros((3, 0, 0), np.uint8)), SIDES),
    "negative": (zipped(header((3, -4, -4)) + bytes(48)), SIDES),
    "not finite": (saved(data=np.full((3, 4, 4), np.nan, np.float16)), "npz with values that are not finite"),
    "absurd shape": (zipped(header(HUGE) + bytes(48)), LIES),
    "absurd shape, deflated": (zipped(header(HUGE) + bytes(48), method=zipfile.ZIP_DEFLATED), LIES),
    "absurd version 2": (zipped(header(HUGE, version=2) + bytes(48)), LIES),
    "more data than it says": (zipped(header((3, 4, 4)) + bytes(49)), LIES),
    "less data than it says": (zipped(header((3, 4, 4)) + bytes(47)), LIES),
    "version 9": (zipped(header((3, 4, 4), version=9)), "npz array with an unknown format"),
    "header of no array": (zipped(b"x" * 200), "damaged npz (ValueError)"),
    "header that is code": (zipped(header("__import__('os')") + bytes(48)), "damaged npz (ValueError)"),
    "header cut short": (zipped(header((3, 4, 4))[:20]), "damaged npz (ValueError)"),
    "header of a megabyte": (zipped(header((3, 4, "9" * 10**6), version=2)), "damaged npz (ValueError)"),
    "an entry larger than the file": (claims(zipped(header((3, 4, 4)) + bytes(48)), 2**31), "claims to be larger"),
    "a flipped bit in the data": (flipped(saved(data=picture()), 500), "damaged npz (BadZipFile)"),
    "a flipped bit in the header": (flipped(saved(data=picture()), 80), "damaged npz"),
    "bzip2": (zipped(b"", method=zipfile.ZIP_BZIP2), "npz compressed with another method than deflate"),
    "two thousand entries": (many(2000), "npz with more arrays than an image needs"),
    "a deflated gibibyte": (None, f"npz array over {MAX_DATA:,} bytes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def gibibyte() -> bytes:
    """A mebibyte that inflates to a gibibyte."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data.npy", "w") as entry:
        for _ in range(2**10):
            entry.write(bytes(2**20))
    return stream.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_is_a_bad_sample(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    """Each by reason and name, nothing unpickled, in under 4 MiB whatever it claims; another is drawn in its place."""
    content, reason = HOSTILE[name]
    pairs = numbered(tmp_path, [picture(seed=seed) for seed in range(4)])
    file = Path(pairs[1].image)
    file.write_bytes(request.getfixturevalue("gibibyte") if content is None else content)
    tracemalloc.start()
    with pytest.raises(BadSample) as bad:
        read_array(str(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad.value.path == str(file)
    assert reason in bad.value.reason
    assert peak < 2**22
    sample = TrainingPairs(pairs, SIZE, None, 0)[0, 1]
    assert sample.skips[0] == Skip(str(file), bad.value.reason)
    assert sample.pixels.shape == (3, SIZE, SIZE)


def test_a_file_that_is_gone_or_a_folder(tmp_path: Path) -> None:
    """Named as images are."""
    (tmp_path / "folder.npz").mkdir()
    for name, reason in (("gone.npz", "file does not exist"), ("folder.npz", "npz cannot be read (IsADirectoryError)")):
        with pytest.raises(BadSample) as bad:
            read_array(str(tmp_path / name))
        assert bad.value.reason == reason


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncations_and_flipped_bits(tmp_path: Path, save: Any) -> None:
    """A small file cut at every length, and with a bit flipped at every byte: the array as it was, or BadSample."""
    array = picture(4)
    save(tmp_path / "whole.npz", data=array)
    whole = (tmp_path / "whole.npz").read_bytes()
    harmless = 0
    for at in range(len(whole)):
        for number, content in enumerate((whole[:at], flipped(whole, at))):
            file = tmp_path / f"{number}.npz"
            file.write_bytes(content)
            try:
                assert np.array_equal(read_array(str(file)), array)
                harmless += 1
            except BadSample:
                pass
    assert harmless < len(whole) / 3
