"""Hostile files: whatever the bytes, a picture in RGB or a bad sample of that path, in bounded time and memory."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.fuzz import chunk, damaged, originals, with_checksums
from train_clip.data import images
from train_clip.data.crops import Window, random_crop, read_square
from train_clip.data.images import FORMATS, MAX_BYTES, MAX_SCANS, open_rgb, read_image
from train_clip.data.pairs import read_caption_lines
from train_clip.errors import BadSample

# Pillow's warnings are silenced where the module is imported, which pytest undoes; the test in a process of its own
# looks at what is printed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")

FILES = originals()
HEADER = 64  # bytes of which every bit is flipped
CROP = 4  # pixels; the pictures are 12 by 10, so that JPEGs are decoded at half the size
SMALL = 10**5  # pixels: the cap where a flip in a header would ask for 89 million


def training_crop() -> Callable[[tuple[int, int]], Window]:
    return partial(random_crop, size=CROP, rng=np.random.default_rng(0))


def assert_picture_or_bad_sample(path: Path) -> bool:
    """Whether it was a picture, whole and as a training crop alike; any other outcome than the two raises."""
    with mock.patch.object(images, "MAX_PIXELS", SMALL):
        try:
            picture = open_rgb(str(path))
        except BadSample as bad:
            assert bad.path == str(path)
            assert bad.reason
            with pytest.raises(BadSample) as caught:
                read_square(str(path), 0, training_crop())
            assert (caught.value.path, caught.value.reason) == (bad.path, bad.reason)
            return False
        assert read_square(str(path), 0, training_crop()).shape == (3, CROP, CROP)
    assert picture.mode == "RGB"
    assert np.asarray(picture).shape == (picture.height, picture.width, 3)
    return True


def test_there_is_a_file_of_every_kind(tmp_path: Path) -> None:
    """Each format that this Pillow reads, and each file sound as it stands, but for the one of floating point."""
    readable = {kind for kind in FORMATS if kind in Image.OPEN or kind == "MPO"}
    assert {name.split()[0] for name in FILES} == readable
    for name, content in FILES.items():
        (tmp_path / "a").write_bytes(content)
        assert assert_picture_or_bad_sample(tmp_path / "a") == (name != "PPM float"), name


@pytest.mark.parametrize("name", FILES)
def test_truncations(tmp_path: Path, name: str) -> None:
    """Each length up to the header's and every fourth beyond: RGB or a bad sample."""
    path = tmp_path / "a.jpg"
    for length in (*range(min(HEADER, len(FILES[name]))), *range(HEADER, len(FILES[name]), 4)):
        path.write_bytes(FILES[name][:length])
        assert_picture_or_bad_sample(path)


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_the_header(tmp_path: Path, name: str) -> None:
    """Each of the first 512 bits flipped, and in a PNG the checksums set right besides: RGB or a bad sample."""
    path = tmp_path / "a.jpg"
    for bit in range(8 * min(HEADER, len(FILES[name]))):
        content = bytearray(FILES[name])
        content[bit // 8] ^= 1 << bit % 8
        for file in {bytes(content), with_checksums(bytes(content)) if name.startswith("PNG") else bytes(content)}:
            path.write_bytes(file)
            assert_picture_or_bad_sample(path)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=20, deadline=None)
@given(chance=st.randoms(use_true_random=False))
def test_damage(name: str, chance: random.Random, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Up to four flips, forged sizes, cuts, and pieces doubled, random or of other formats: RGB or a bad sample."""
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(damaged(FILES[name], list(FILES.values()), chance))
    assert_picture_or_bad_sample(path)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_flipped_bits(
    name: str, flips: list[tuple[float, int]], kept: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A few bits of a small file flipped, and perhaps its end cut off: RGB or a bad sample, nothing else."""
    content = bytearray(FILES[name])
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.jpg"
    path.write_bytes(content[: round(kept * len(content))])
    assert_picture_or_bad_sample(path)


@settings(max_examples=100, deadline=None)
@given(
    start=st.sampled_from([0, 2, 4, 8, 12, 16, 30]), name=st.sampled_from(sorted(FILES)), rest=st.binary(max_size=300)
)
def test_random_bytes(start: int, name: str, rest: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes, after nothing or after a format's first ones: RGB or a bad sample, nothing else."""
    path = tmp_path_factory.getbasetemp() / "random.jpg"
    path.write_bytes(FILES[name][:start] + rest)
    assert_picture_or_bad_sample(path)


@settings(max_examples=100, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(max_size=60).map(lambda text: text.encode("utf-16", "surrogatepass")),
        st.lists(st.sampled_from([b"\xef\xbb\xbf", b"a b", b"\r", b"\n", b" ", b"\0", "\u2028".encode()])).map(
            b"".join
        ),
    )
)
def test_captions_of_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lines that are stripped, not blank, and in the file as they stand, or a bad sample; never lines of no UTF-8."""
    path = tmp_path_factory.getbasetemp() / "caption.txt"
    path.write_bytes(content)
    try:
        lines = read_caption_lines(str(path))[0]
    except BadSample as bad:
        assert bad.path == str(path)
        assert bad.reason
        return
    text = content.decode()
    assert lines
    assert all(line and line == line.strip() and "\n" not in line and "\0" not in line for line in lines)
    assert all(line in text for line in lines)


def many_scans(repeats: int) -> bytes:
    """A progressive JPEG whose first scan of AC coefficients comes again and again."""
    content = FILES["JPEG progressive"]
    starts = [found.start() for found in images.SCAN.finditer(content)]
    # The scan's Huffman table stands before it; the next table or scan after it.
    table = content.rindex(b"\xff\xc4", 0, starts[1])
    end = content.index(b"\xff\xc4", starts[1])
    return content[:table] + content[table:end] * (repeats + 1) + content[end:]


def test_a_progressive_jpeg_of_many_scans(tmp_path: Path) -> None:
    """Scans cost time and next to no bytes: as many as allowed are read, to the same pixels, and one more is not."""
    usual = len(images.SCAN.findall(FILES["JPEG progressive"]))
    assert usual == 10  # libjpeg's script for progressive colour
    (tmp_path / "usual.jpg").write_bytes(FILES["JPEG progressive"])
    (tmp_path / "most.jpg").write_bytes(many_scans(MAX_SCANS - usual))
    (tmp_path / "over.jpg").write_bytes(many_scans(MAX_SCANS - usual + 1))
    most, plain = (np.asarray(open_rgb(str(tmp_path / name))) for name in ("most.jpg", "usual.jpg"))
    assert (most == plain).all()
    with Image.open(tmp_path / "over.jpg") as picture:
        assert (np.asarray(picture) == plain).all()
    with pytest.raises(BadSample, match="over 100 scans"):
        read_image(str(tmp_path / "over.jpg"))


def test_a_plain_jpeg_of_many_scans(tmp_path: Path) -> None:
    """Scans of one component without data, as many as allowed and one more: sequential ones cost a pass each too."""
    content = FILES["JPEG"]
    start = content.index(b"\xff\xda")
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    for scans, why in ((MAX_SCANS, "damaged image"), (MAX_SCANS + 1, "JPEG with over 100 scans")):
        (tmp_path / "a.jpg").write_bytes(content[:start] + scan * scans)
        with pytest.raises(BadSample, match=why):
            read_image(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", ["WEBP", "JPEG", "PNG"])
def test_a_huge_file(tmp_path: Path, name: str) -> None:
    """One byte over a gibibyte (of a hole, so of no disk) is refused unread, where one at the limit is looked into."""
    path = tmp_path / "a"
    path.write_bytes(FILES[name])
    with path.open("r+b") as file, mock.patch.object(Image, "open", side_effect=OSError) as opened:
        file.truncate(MAX_BYTES)
        with pytest.raises(BadSample, match="damaged"):
            read_image(str(path))
        opened.assert_called_once()
        file.truncate(MAX_BYTES + 1)
        with pytest.raises(BadSample, match="image file over 1,073,741,824 bytes"):
            read_image(str(path))
        opened.assert_called_once()


# Time and memory

MIB = 1536  # that the process below may take beyond what it starts with; a picture at the cap takes 341 in RGB
CHILD = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from train_clip.data.images import image_suffixes, read_image
from train_clip.data.crops import read_square
from train_clip.data.crops import random_crop
from train_clip.errors import BadSample

image_suffixes()
start = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (start + int(sys.argv[2]) * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    signal.setitimer(signal.ITIMER_PROF, 20)  # of the processor
    try:
        print(path.name, read_image(str(path)).picture.size, sep=": ")
        read_square(str(path), 0, lambda size: random_crop(size, 224, np.random.default_rng(0)))
    except BadSample as bad:
        print(bad.path.rsplit("/", 1)[1], bad.reason, sep=": ")
"""


def worst_files() -> dict[str, bytes]:
    """Small files that ask for much, each under half a megabyte but one."""
    side = 9_459  # the largest square under the cap
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64)]
    directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    tiles = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 1),
        (262, 1),
        (277, 1),
        (322, 9_472),
        (323, 9_472),
        (324, 8),
        (325, 64),
    ]
    tiled = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tiles)
    twice = png(13_376, 13_376, 1, 0)
    webp = FILES["WEBP frames"]
    canvas = webp.index(b"VP8X") + 12
    return {
        "palette with alpha.png": png(side, side, 8, 3, chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256))),
        "rgba.png": png(side, side, 8, 6),
        "16 bits.png": png(side, side, 16, 0),
        "twice the cap.ico": b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(twice), 22) + twice,
        "frames.gif": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 128, 0, 0) + bytes(6) + frame * 100_000 + b";",
        "loop.tif": b"II" + struct.pack("<HI", 42, 8) + directory + struct.pack("<I", 8) + bytes(64),
        "tile.tif": b"II" + struct.pack("<HI", 42, 8) + tiled + struct.pack("<I", 0) + bytes(64),
        "canvas.webp": webp[:canvas] + b"\xfe\x3f\0" * 2 + webp[canvas + 6 :],
        "scans.jpg": many_scans(5_000),
        "precincts.j2k": precincts(2_000),
        "line ends.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 62, 40, 10_000, 900, 1, 8, 1, 0, 0, 0, 2, 0)
        + b"\0\0\xff\0\xff\xff\xff\0"
        + b"\1\1\0\0" * 900,
        "comments.ppm": b"P3\n3000 3000\n255\n" + b"#\n" * 100_000,
    }


def png(width: int, height: int, bits: int, colour: int, before: bytes = b"") -> bytes:
    """A PNG of zeros of any size, in a thousandth of its bytes."""
    samples = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row, packer = bytes(1 + (width * bits * samples + 7) // 8), zlib.compressobj(1)
    rows = b"".join(packer.compress(row * 100) for _ in range(height // 100 + 1)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def precincts(side: int) -> bytes:
    """A JPEG 2000 codestream (T.800, annex A) of precincts of one sample, for each of which OpenJPEG allots memory."""
    size = struct.pack(">HIIIIIIIIH", 0, side, side, 0, 0, side, side, 0, 0, 3) + bytes([7, 1, 1]) * 3
    style = bytes([1, 0, 0, 1, 0, 0, 4, 4, 0, 1, 0])
    marked = ((b"\xff\x51", size), (b"\xff\x52", style), (b"\xff\x5c", b"\x40\x40"))
    header = b"".join(mark + struct.pack(">H", len(content) + 2) + content for mark, content in marked)
    tile = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 114, 0, 1) + b"\xff\x93" + bytes(100)
    return b"\xff\x4f" + header + tile + b"\xff\xd9"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and limits of the address space")
def test_time_and_memory_are_bounded(tmp_path: Path) -> None:
    """The worst files and 300 damaged ones with the real cap, in a process that stays alive, in time and silent."""
    chance = random.Random(0)
    content = list(FILES.values())
    files = worst_files()
    files |= {f"{number}": damaged(chance.choice(content), content, chance) for number in range(300)}
    for name, of in files.items():
        (tmp_path / name).write_bytes(of)
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(MIB)], capture_output=True, text=True, timeout=600
    )
    found = dict(line.split(": ", 1) for line in ended.stdout.splitlines())
    assert ended.returncode == 0, (ended.returncode, ended.stdout[-300:], ended.stderr[-2000:])
    assert found.keys() == files.keys()
    # libtiff writes errors on its own.
    assert "Warning:" not in ended.stderr
    assert "Traceback" not in ended.stderr
    for name in ("palette with alpha.png", "rgba.png", "16 bits.png"):
        assert found[name] == "(9459, 9459)"
    assert found["twice the cap.ico"] == "over 89,478,485 pixels"
    assert found["canvas.webp"] in ("over 89,478,485 pixels", "damaged image (OSError)")  # Pillow 13 and 11
    assert found["scans.jpg"] == "JPEG with over 100 scans"
    assert found["comments.ppm"] == "PPM with over 1,000 comments"
    assert found["tile.tif"] == "TIFF with tiles over 89,478,485 pixels"
    assert found["precincts.j2k"] == "not an image that Pillow can read"
    assert found["frames.gif"] == "(9, 9)"
    assert found["loop.tif"] == "(8, 8)"
