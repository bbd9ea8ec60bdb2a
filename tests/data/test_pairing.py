"""Arrays beside images, and pairs by number: what belongs together by the names alone."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from train_clip.data.folder import cache_name, scan_folder
from train_clip.data.pairs import split_pairs
from train_clip.data.scan import Scan, scan_source
from train_clip.errors import UserError
from train_clip.options import PairBy, SourceOptions


def scan(folder: Path, *names: str, pair_by: PairBy = "stem") -> Scan:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return scan_folder(folder, SourceOptions(pair_by=pair_by))


def found(scan: Scan) -> list[tuple[str, ...]]:
    """Image, caption and cache of each pair, below the folder."""
    parts = [(pair.image, pair.caption, pair.cache) for pair in scan.pairs]
    return [tuple(part and str(PurePosixPath(part).relative_to(scan.source)) for part in pair) for pair in parts]


LAYOUTS = {
    "two levels": (
        ["img/a.jpg", "text/a.txt", "npz/a.npz", "img/b.jpg", "text/b.txt", "npz/b.npz"],
        [("img/a.jpg", "text/a.txt", "npz/a.npz"), ("img/b.jpg", "text/b.txt", "npz/b.npz")],
    ),
    "side by side": (["a.jpg", "a.txt", "npz/a.npz"], [("a.jpg", "a.txt", "npz/a.npz")]),
    "one stem in two folders": (
        ["u/1.jpg", "u/1.txt", "v/1.png", "v/1.txt", "npz/u/1.npz", "npz/v/1.npz"],
        [("u/1.jpg", "u/1.txt", "npz/u/1.npz"), ("v/1.png", "v/1.txt", "npz/v/1.npz")],
    ),
    "an image that has none yet": (
        ["img/a.jpg", "text/a.txt", "npz/a.npz", "img/b.jpg", "text/b.txt"],
        [("img/a.jpg", "text/a.txt", "npz/a.npz"), ("img/b.jpg", "text/b.txt", "")],
    ),
    "arrays alone": (["text/a.txt", "npz/a.npz"], [("npz/a.npz", "text/a.txt", "")]),
    "arrays anywhere": (["u/a.npz", "u/a.txt"], [("u/a.npz", "u/a.txt", "")]),
    "dots": (["a.b.jpg", "a.b.txt", "npz/a.b.npz"], [("a.b.jpg", "a.b.txt", "npz/a.b.npz")]),
    "accents, taken apart in the array": (
        ["img/\u00e4.jpg", "text/\u00e4.txt", "npz/a\u0308.npz"],
        [("img/\u00e4.jpg", "text/\u00e4.txt", "npz/a\u0308.npz")],
    ),
    "accents, taken apart in the image": (
        ["img/a\u0308.jpg", "text/a\u0308.txt", "npz/\u00e4.npz"],
        [("img/a\u0308.jpg", "text/a\u0308.txt", "npz/\u00e4.npz")],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    """Nine layouts, against the pairs a person would make: arrays take their image's place, none stands alone."""
    names, pairs = LAYOUTS[name]
    scanned = scan(tmp_path, *names)
    assert found(scanned) == pairs
    assert (scanned.lone_images, scanned.lone_captions, scanned.faults) == ([], [], [])
    assert scanned.pairs.num_cached == sum(bool(cache) for _, _, cache in pairs)


def test_another_images_array_is_never_read(tmp_path: Path) -> None:
    """Arrays that no image's name leads to: left over where nothing of their stem is free, else a fault."""
    stale = scan(tmp_path / "stale", "x/a.jpg", "x/a.txt", "npz/y/a.npz")
    assert found(stale) == [("x/a.jpg", "x/a.txt", "")]
    assert stale.lone_images == ["npz/y/a.npz"]
    unclear = scan(tmp_path / "unclear", "x/a.jpg", "a.txt", "npz/a.npz")
    assert len(unclear.pairs) == 0
    assert "the stem a is in 3 names, so it is not clear" in unclear.faults[0]
    assert "npz/a.npz" in unclear.faults[0]
    two = scan(tmp_path / "two", "img/a.jpg", "img/a.txt", "a.jpg", "a.txt", "npz/a.npz")
    assert "the stem a is in 3 names" in two.faults[0]


def test_an_image_without_caption_is_counted_once(tmp_path: Path) -> None:
    """Its array is no second image without a caption."""
    scanned = scan(tmp_path, "img/a.jpg", "npz/a.npz", "img/b.jpg", "text/b.txt")
    assert scanned.lone_images == ["img/a.jpg"]


def test_arrays_change_neither_order_nor_split(tmp_path: Path) -> None:
    """Forty pairs before and after arrays are made of them: names, order and the held-out pairs are the same."""
    names = [f"{place}/{number}.{suffix}" for number in range(40) for place, suffix in (("z", "jpg"), ("text", "txt"))]
    before = scan(tmp_path, *names).pairs
    after = scan(tmp_path, *(cache_name(name) for name in names if name.endswith("jpg"))).pairs
    assert after.num_cached == 40
    assert list(after.names) == list(before.names)
    for one, other in zip(split_pairs(before, 0.25), split_pairs(after, 0.25), strict=True):
        assert list(one.names) == list(other.names)
        assert other.num_cached == len(other)
    joined = after.followed_by(before)
    assert [pair.cache for pair in joined] == [pair.cache for pair in after] + [""] * 40
    assert joined.take([0, 41])[0].pixels == after[0].cache


def test_pairs_by_number(tmp_path: Path) -> None:
    """The fork's picture, with leading zeros, one number only in npz/, and a name without a number."""
    names = ["img/image1.jpg", "text/text1.txt", "npz/data1.npz", "img/image007.jpg", "text/7.txt", "text/t3.txt"]
    scanned = scan(
        tmp_path, *names, "npz/data3.npz", "text/notes.txt", "img/image9.jpg", "npz/data9.npz", pair_by="number"
    )
    assert found(scanned) == [
        ("img/image007.jpg", "text/7.txt", ""),
        ("img/image1.jpg", "text/text1.txt", "npz/data1.npz"),
        ("npz/data3.npz", "text/t3.txt", ""),
    ]
    assert (scanned.lone_images, scanned.lone_captions) == (["img/image9.jpg"], ["text/notes.txt"])
    assert scanned.faults == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["img/cat2_17.jpg", "text/17.txt"], r"cat2_17.jpg: holds 2 numbers \(2, 17\), so it is not clear"),
        (["img/a1.jpg", "img/b01.jpg", "text/1.txt"], r"the number 1 is in 3 names.*\n  img/a1.jpg\n  img/b01.jpg\n"),
        (
            ["img/a1.jpg", "text/a1.txt", "u/b1.txt"],
            r"the number 1 is in 3 names.*\n  img/a1.jpg\n  text/a1.txt\n  u/b1",
        ),
        (["img/a1.jpg", "text/1.txt", "npz/1.npz", "npz/d1.npz"], r"the number 1 is in 4 names"),
    ],
)
def test_an_unclear_number_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    """Two numbers in a name, one number in two names of a kind: a fault that names them."""
    with pytest.raises(UserError, match=message):
        scan(tmp_path, *names, pair_by="number").require_pairs()


def test_no_pair_by_stem_in_folders_that_are_known(tmp_path: Path) -> None:
    """The fork's picture by stem: names of both kinds and the offer, taken only when it is given."""
    numbers = range(1, 6)
    names = [name for n in numbers for name in (f"img/image{n}.jpg", f"text/text{n}.txt", f"npz/data{n}.npz")]
    with pytest.raises(UserError) as refused:
        scan(tmp_path, *names).require_pairs()
    for line in (
        "Images without a caption: 10, for instance img/image1.jpg",
        "Captions without an image: 5, for instance text/text1.txt",
        "pass --pair_by number.",
    ):
        assert line in str(refused.value)
    assert len(scan_folder(tmp_path, SourceOptions(pair_by="number")).require_pairs().pairs) == 5


def test_the_offer_is_for_pairing_by_stem_alone(tmp_path: Path) -> None:
    """Folders of any name get the offer, and pairing by number that finds nothing gets none."""
    with pytest.raises(UserError) as refused:
        scan(tmp_path / "a", "photos/image1.jpg", "words/text1.txt").require_pairs()
    assert "--pair_by number" in str(refused.value)
    with pytest.raises(UserError, match="Images without a caption: 1, for instance img/image1") as refused:
        scan(tmp_path / "b", "img/image1.jpg", "text/text2.txt", pair_by="number").require_pairs()
    assert "The files of a pair share a number" in str(refused.value)
    assert "--pair_by" not in str(refused.value)


def test_a_table_is_not_paired_by_number(tmp_path: Path) -> None:
    """A table says what belongs together; a word that is no way to pair is refused with those that are."""
    with pytest.raises(UserError, match="--pair_by number: is only for a folder"):
        scan_source(None, SourceOptions(pairs=tmp_path / "pairs.csv", pair_by="number"))
    with pytest.raises(UserError, match="pair_by is 'name'; expected one of stem, number"):
        scan_source(tmp_path, SourceOptions(pair_by="name"))  # type: ignore[arg-type]
