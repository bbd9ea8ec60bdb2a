"""Damaged files of every kind that is read, until the time is up: each a picture or a bad sample, or it is wrong.

    python benchmarks/fuzz.py --minutes 10 [--seed 0] [--kinds PNG,JPEG] [--folder /tmp/fuzz]

A worker reads each file whole and as a training crop, which have to agree, under a limit of memory and of seconds, and
is started again when it dies. What was wrong, or took over ``SLOW`` seconds, lies in the folder afterwards; the status
is 1 after a crash, a hang, a warning, or anything but an RGB picture or a ``BadSample`` of the right path. Needs Linux.
``originals`` and ``damaged`` serve the tests too.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from train_clip.data import images
from train_clip.data.crops import random_crop, read_square
from train_clip.errors import BadSample

SECONDS, SLOW = 30, 2.0  # for a file: until it counts as a hang, and as worth a look
MIB = 4096  # of address space that the worker may take beyond what it starts with
SIDES = (0, 1, 2, 255, 256, 1_000, 9_459, 9_460, 30_000, 2**15, 2**16 - 1, 89_478_485, 2**31 - 1, 2**31, 2**32 - 1)
CROP = 4  # pixels; pictures are 12 by 10, so that JPEGs are decoded at half the size
NOISE = "none of these"  # random bytes, text, HTML: no kind's first bytes
TIFF = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma")


def originals() -> dict[str, bytes]:
    """A small file of every kind and variant that this build of Pillow writes, or that is easily put together."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    rgb, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    grey, palette = rgb.convert("L"), rgb.quantize(8)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", 6
    two: dict[str, Any] = {"save_all": True, "append_images": [other]}
    wanted: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        **{kind: (rgb, {}) for kind in sorted(set(images.FORMATS) - {"PSD", "QOI"})},
        "ICO": (rgb.resize((16, 16)), {}),
        "JPEG progressive": (rgb, {"progressive": True}),
        "JPEG inks": (rgb.convert("CMYK"), {}),
        "JPEG EXIF": (rgb, {"exif": exif}),
        "PNG palette": (palette, {"transparency": bytes([0, 128, 255])}),
        "PNG RGBA": (rgb.convert("RGBA"), {"exif": exif}),
        "PNG 16-bit": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "PNG two colours": (rgb.convert("1"), {}),
        **{f"{kind} frames": (rgb, two) for kind in ("PNG", "GIF", "WEBP", "TIFF", "AVIF", "MPO")},
        "WEBP lossless": (rgb.convert("RGBA"), {"lossless": True, "exif": exif}),
        **{f"TIFF {name}": (rgb, {"compression": name}) for name in TIFF},
        **{f"TIFF {name}": (rgb.convert("1"), {"compression": name}) for name in ("group3", "group4", "tiff_ccitt")},
        "TIFF 16-bit": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "BMP palette": (palette, {}),
        "TGA runs": (rgb.convert("RGBA"), {"compression": "tga_rle"}),
        "PPM 16-bit": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "PPM float": (grey.convert("F"), {}),
        "ICO bitmap": (rgb.convert("RGBA").resize((16, 16)), {"bitmap_format": "bmp"}),
    }
    files = {}
    for name, (picture, how) in wanted.items():
        stream = io.BytesIO()
        try:
            picture.save(stream, name.split()[0], **how)
        except (KeyError, ValueError, OSError, RuntimeError):
            continue  # not in this build
        files[name] = stream.getvalue()
    planes = pixels.transpose(2, 0, 1).tobytes()
    photoshop = b"8BPS" + struct.pack(">H6xHIIHHIII", 1, 3, 10, 12, 8, 3, 0, 0, 0)
    runs = struct.pack(">H", 13) * 30 + b"".join(b"\x0b" + planes[start : start + 12] for start in range(0, 360, 12))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in pixels[y::down, x::right, 0])
    plain = " ".join(map(str, pixels.ravel()))
    return files | {
        "PNG interlaced": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 12, 10, 8, 0, 0, 0, 1))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b""),
        "BMP runs": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 62, 40, 12, 10, 1, 8, 1, 0, 0, 0, 2, 0)
        + b"\0\0\xff\0\xff\xff\xff\0"
        + (b"\x06\0\0\x05\1\0\1\0\1\0\1\1\0\0") * 10,
        "PPM plain": f"P3 # made by hand\n12 10\n255\n{plain}\n".encode(),
        "PSD": photoshop + b"\0\0" + planes,
        "PSD runs": photoshop + b"\0\1" + runs,
        "QOI": b"qoif\0\0\0\x0c\0\0\0\x0a\3\0"
        + b"".join(b"\xfe" + bytes(p) for p in pixels.reshape(-1, 3))
        + b"\0" * 8,
    }


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG with its right checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def damaged(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Damage a file in one to four ways, each by lot.

    Args:
        content: of a sound file.
        others: of which pieces are taken.
        chance: decides.
    """
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(chance.choice((64, len(content))) or 1) % max(1, len(content))
        end = place + chance.choice((1, 2, 4, 16, 200))
        match chance.randrange(7):
            case 0 | 1:
                flipped = content[place] ^ (1 << chance.randrange(8)) if content else 0
                content = content[:place] + bytes([flipped]) + content[place + 1 :]
            case 2:
                form = chance.choice(("<I", ">I", "<H", ">H"))
                size = struct.pack(form, chance.choice(SIDES) % 2 ** (8 * struct.calcsize(form)))
                content = content[:place] + size + content[place + len(size) :]
            case 3:
                content = content[:place]
            case 4:
                content = content[:place] + chance.choice(others)[place:]
            case 5:
                content = content[:place] + content[place:end] * chance.choice((0, 2, 100)) + content[end:]
            case 6:
                content = content[:place] + chance.randbytes(end - place) + content[end:]
    if content.startswith(b"\x89PNG") and chance.randrange(2):
        content = with_checksums(content)
    return content


def with_checksums(png: bytes) -> bytes:
    """A PNG whose checksums are set right, so that the damage gets past them."""
    mended, place = png[:8], 8
    while place + 12 <= len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        mended += chunk(png[place + 4 : place + 8], png[place + 8 : place + 8 + size])
        place += 12 + size
    return mended


def noise(chance: random.Random) -> bytes:
    """What is no picture: random bytes, text in three encodings, a page."""
    words = " ".join(chance.choice(("404", "not", "found", "P6", "BM", "\n", "\t", "ä")) for _ in range(200))
    size = chance.randrange(2000)
    return chance.choice(
        (chance.randbytes(size), words.encode(), words.encode("utf-16-le"), f"<html>{words}</html>".encode())
    )


@dataclass
class Tally:
    """What became of the files of a kind."""

    pictures: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: float = 0.0
    wrong: Counter[str] = field(default_factory=Counter)

    def row(self, kind: str) -> str:
        """A line of the Markdown table."""
        bad = self.reasons.total()
        often = ", ".join(f"{reason} {number:,}" for reason, number in self.reasons.most_common(3))
        wrong = " | ".join(str(self.wrong[what]) for what in ("crash", "hang", "other"))
        files = self.pictures + bad + self.wrong.total()
        row = f"| {kind} | {files:,} | {self.pictures:,} | {bad:,} | {self.slowest:.2f} | {self.memory:,.0f}"
        return f"{row} | {wrong} | {often} |"


def main() -> int:
    """Fuzz, print the table, and say by the status whether anything was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.worker is not None:
        work(given.folder, given.seed, given.worker, given.kinds)
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    until, index = time.monotonic() + 60 * given.minutes, 0
    messages = given.folder / "messages.txt"
    messages.write_bytes(b"")
    while time.monotonic() < until:
        index = watch(given, index, until, tallies, messages)
    print(
        f"`python benchmarks/fuzz.py {' '.join(sys.argv[1:])}`, Pillow {PIL.__version__}, {time.strftime('%Y-%m-%d')}\n"
    )
    print("| kind | files | pictures | bad samples | slowest, s | memory, MiB | crashes | hangs | other | most often |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in sorted(tallies):
        print(tallies[kind].row(kind))
    said = messages.read_text(errors="replace").splitlines()
    warned = [line for line in said if "Warning:" in line or "Traceback" in line]
    print(
        f"\n{len(said) - len(warned):,} other lines on stderr (libtiff's), {len(warned)} warnings",
        *warned[:9],
        sep="\n",
    )
    return int(bool(warned) or any(tally.wrong for tally in tallies.values()))


def watch(given: argparse.Namespace, index: int, until: float, tallies: defaultdict[str, Tally], messages: Path) -> int:
    """Run a worker until it dies or the time is up; the number of the next file."""
    command = [sys.executable, __file__, "--worker", str(index), "--seed", str(given.seed), "--kinds", given.kinds]
    with messages.open("ab") as said:
        worker = subprocess.Popen([*command, "--folder", given.folder], stdout=subprocess.PIPE, stderr=said, text=True)
    assert worker.stdout is not None
    kind = NOISE
    for line in worker.stdout:
        what, _, rest = line.rstrip("\n").partition("\t")
        if what == "next":
            number, kind = rest.split("\t")
            index, kind = int(number) + 1, kind if kind == NOISE else kind.split()[0]
            continue
        outcome, seconds, memory = rest.split("\t")
        tally = tallies[kind]
        tally.slowest, tally.memory = max(tally.slowest, float(seconds)), max(tally.memory, float(memory))
        if what == "picture":
            tally.pictures += 1
        else:
            (tally.reasons if what == "bad" else tally.wrong)[outcome] += 1
        if time.monotonic() > until:
            worker.kill()
            worker.wait()
            return index
    ended = worker.wait()
    what = "hang" if ended == -signal.SIGALRM else "crash"
    tallies[kind].wrong[what] += 1
    if (given.folder / "current").exists():
        shutil.copy(given.folder / "current", given.folder / f"{what}{ended}-{index - 1}")
    return max(index, 1)


def work(folder: Path, seed: int, index: int, kinds: str) -> None:
    """Decode file after file, each made from the seed and its number, and print what became of it. Never returns."""
    files = originals()
    content = list(files.values())
    names = [name for name in files if not kinds or name.split()[0] in kinds.split(",")] + ([] if kinds else [NOISE])
    images.image_suffixes()
    start = int(in_status("VmSize") * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (start + MIB * 2**20,) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler of Python's would wait for the decoder
    current = folder / "current"
    while True:
        chance = random.Random(f"{seed} {index}")
        name = chance.choice(names)
        current.write_bytes(noise(chance) if name == NOISE else damaged(files[name], content, chance))
        print(f"next\t{index}\t{name}", flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, begin = in_status("VmRSS"), time.perf_counter()
        signal.alarm(SECONDS)
        what, outcome = outcome_of(str(current))
        signal.alarm(0)
        seconds = time.perf_counter() - begin
        if what == "wrong" or seconds > SLOW:
            shutil.copy(current, folder / f"{'slow' if what != 'wrong' else 'other'}-{index}")
        print(f"{what}\t{outcome}\t{seconds}\t{in_status('VmHWM') - before}", flush=True)
        index += 1


def outcome_of(path: str) -> tuple[str, str]:
    """What reading a file gives, whole and as a training crop: a picture, a bad sample and its reason, or wrong."""
    whole = outcome_of_whole(path)
    try:
        crop = read_square(path, 0, partial(random_crop, size=CROP, rng=np.random.default_rng(0)))
    except BadSample as bad:
        return whole if whole == ("bad", bad.reason) and bad.path == path else ("wrong", "other")
    except BaseException:
        return "wrong", "other"
    return whole if whole[0] == "picture" and crop.shape == (3, CROP, CROP) else ("wrong", "other")


def outcome_of_whole(path: str) -> tuple[str, str]:
    """The same of the whole picture."""
    try:
        picture = images.read_image(path).picture
    except BadSample as bad:
        return ("bad", bad.reason) if bad.path == path and bad.reason else ("wrong", "other")
    except BaseException:
        return "wrong", "other"
    sound = picture.mode == "RGB" and len(picture.tobytes()) == 3 * picture.width * picture.height
    return ("picture", "") if sound and picture.width * picture.height <= images.MAX_PIXELS else ("wrong", "other")


def in_status(key: str) -> float:
    """A figure of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(main())
