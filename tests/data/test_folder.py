"""Pairing by stem: against layouts whose pairs are plain to see, and against a recursive restatement of the rule."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_clip.data.folder import FolderScan, Pair, scan_folder, split_pairs
from train_clip.errors import UserError


def touch(folder: Path, *names: str) -> Path:
    """Make empty files: the scan reads names alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def relative(scan: FolderScan) -> list[tuple[str, str]]:
    """The pairs below the folder."""
    return [
        (Path(pair.image).relative_to(scan.folder).as_posix(), Path(pair.caption).relative_to(scan.folder).as_posix())
        for pair in scan.pairs
    ]


LAYOUTS = {
    "side by side": (["a.jpg", "a.txt", "b.png", "b.txt"], [("a.jpg", "a.txt"), ("b.png", "b.txt")]),
    "img and txt": (["img/a.jpg", "txt/a.txt"], [("img/a.jpg", "txt/a.txt")]),
    "img and txt, deeper": (["x/img/1/a.jpg", "x/txt/2/a.txt"], [("x/img/1/a.jpg", "x/txt/2/a.txt")]),
    "two subfolders with a pair each": (
        ["u/a.jpg", "u/a.txt", "v/a.jpg", "v/a.txt"],
        [("u/a.jpg", "u/a.txt"), ("v/a.jpg", "v/a.txt")],
    ),
    "img and txt in each of two subfolders": (
        ["u/img/a.jpg", "u/txt/a.txt", "v/img/a.jpg", "v/txt/a.txt"],
        [("u/img/a.jpg", "u/txt/a.txt"), ("v/img/a.jpg", "v/txt/a.txt")],
    ),
    "a pair above and a pair below": (
        ["a.jpg", "a.txt", "u/a.jpg", "u/a.txt"],
        [("a.jpg", "a.txt"), ("u/a.jpg", "u/a.txt")],
    ),
    "the nearer caption first, the farther one for what is left": (
        ["a.txt", "u/a.jpg", "u/v/a.jpg", "u/v/a.txt"],
        [("u/a.jpg", "a.txt"), ("u/v/a.jpg", "u/v/a.txt")],
    ),
    "a caption above its image": (["a.txt", "u/v/a.jpg"], [("u/v/a.jpg", "a.txt")]),
    "dots in the stem": (
        ["a.b.c.jpg", "a.b.c.txt", "a.b.d.jpg", "a.b.d.txt"],
        [("a.b.c.jpg", "a.b.c.txt"), ("a.b.d.jpg", "a.b.d.txt")],
    ),
    "blanks and letters beyond ASCII": (["ein Bär 猫.jpg", "ein Bär 猫.txt"], [("ein Bär 猫.jpg", "ein Bär 猫.txt")]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    """Ten ways to lay out a data set, against the pairs a person would make."""
    files, pairs = LAYOUTS[name]
    scan = scan_folder(touch(tmp_path, *files))
    assert relative(scan) == pairs
    assert scan.num_files == len(files)
    assert scan.lone_images == scan.lone_captions == []


def test_a_caption_that_names_another_dotted_stem_is_no_partner(tmp_path: Path) -> None:
    """Only the last dot ends the stem: a.b.jpg and a.c.txt share "a" and are no pair."""
    scan = scan_folder(touch(tmp_path, "a.b.jpg", "a.c.txt"))
    assert scan.pairs == []
    assert (scan.lone_images, scan.lone_captions) == (["a.b.jpg"], ["a.c.txt"])


class Ambiguous(Exception):
    """The reference's word for a place with two of a kind."""


def reference_pairs(files: list[str]) -> list[tuple[str, str]]:
    """The rule restated on a tree: a folder pairs what it holds with what its subfolders could not pair."""
    pairs = []

    def left_over(place: PurePosixPath) -> list[str]:
        here = [file for file in files if PurePosixPath(file).parent == place]
        children = {
            PurePosixPath(*PurePosixPath(file).parts[: len(place.parts) + 1])
            for file in files
            if place in PurePosixPath(file).parents and PurePosixPath(file).parent != place
        }
        for child in sorted(children):
            here += left_over(child)
        images = [file for file in here if file.endswith(".jpg")]
        captions = [file for file in here if file.endswith(".txt")]
        if not images or not captions:
            return here
        if len(here) > 2:
            raise Ambiguous
        pairs.append((images[0], captions[0]))
        return []

    left_over(PurePosixPath("."))
    return sorted(pairs)


PLACES = ["", "u/", "v/", "u/u/", "u/v/", "v/u/", "u/v/u/", "u/v/v/"]


@settings(max_examples=150, deadline=None)
@given(st.sets(st.sampled_from([f"{place}s{suffix}" for place in PLACES for suffix in (".jpg", ".txt")]), max_size=7))
def test_any_tree_of_one_stem(files: set[str]) -> None:
    """Up to seven files of one stem anywhere in a tree, against the rule restated as a recursion over folders."""
    with tempfile.TemporaryDirectory() as name:
        folder = touch(Path(name), *files)
        try:
            expected = reference_pairs(sorted(files))
        except Ambiguous:
            with pytest.raises(UserError):
                scan_folder(folder)
        else:
            assert relative(scan_folder(folder)) == expected


@pytest.mark.parametrize(
    "files",
    [
        ["a.jpg", "a.png", "a.txt"],
        ["u/a.jpg", "v/a.jpg", "a.txt"],
        ["img/u/a.jpg", "img/v/a.jpg", "txt/a.txt"],
        ["u/a.txt", "v/a.txt", "a.jpg"],
        ["a.jpg", "a.txt", "thumbnails/a.jpg"],
    ],
)
def test_two_candidates_at_one_place_stop_the_scan(tmp_path: Path, files: list[str]) -> None:
    """Where it is unclear which files belong together every candidate is named, and no pair is guessed."""
    with pytest.raises(UserError) as caught:
        scan_folder(touch(tmp_path, "unrelated.jpg", "unrelated.txt", *files))
    message = str(caught.value)
    for file in files:
        assert f"\n  {file}\n" in message
    assert "unrelated" not in message
    assert "Rename or remove" in message


AMBIGUOUS = {
    "2 images and 1 caption": (["a.jpg", "a.png", "a.txt"], ["  x/a.jpg", "  x/a.png", "  x/a.txt"]),
    "1 image and 2 captions": (["a.jpg", "u/a.txt", "v/a.txt"], ["  x/a.jpg", "  x/u/a.txt", "  x/v/a.txt"]),
    "3 images and 3 captions": (
        ["1/a.jpg", "2/a.jpg", "3/a.jpg", "4/a.txt", "5/a.txt", "6/a.txt"],
        ["  x/1/a.jpg", "  x/2/a.jpg", "  x/3/a.jpg", "  x/4/a.txt", "  x/5/a.txt", "  x/6/a.txt"],
    ),
    "5 images and 4 captions": (
        ["a.jpg", "a.jpeg", "a.png", "a.bmp", "a.gif", "4/a.txt", "3/a.txt", "2/a.txt", "1/a.txt"],
        ["  x/1/a.txt", "  x/2/a.txt", "  x/3/a.txt", "  x/4/a.txt", "  x/a.bmp", "  x/a.gif", "  and 3 more."],
    ),
}


@pytest.mark.parametrize("count", AMBIGUOUS)
def test_the_message_for_an_ambiguous_stem(tmp_path: Path, count: str) -> None:
    """Word for word: the place, how many of each, six of them in order and the number of the others, what to do."""
    files, listed = AMBIGUOUS[count]
    with pytest.raises(UserError) as caught:
        scan_folder(touch(tmp_path / "x", *files).parent)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'x'}: one stem has {count}, so it is not clear which belong together:",
        *listed,
        "  Expected one of each. Rename or remove the others.",
    ]


def test_two_images_without_any_caption_are_lone_not_ambiguous(tmp_path: Path) -> None:
    """cat.jpg beside cat.png stops nothing while no caption could belong to both."""
    scan = scan_folder(touch(tmp_path, "cat.jpg", "cat.png", "u/dog.txt", "v/dog.txt", "a.jpg", "a.txt"))
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert scan.lone_images == ["cat.jpg", "cat.png"]
    assert scan.lone_captions == ["u/dog.txt", "v/dog.txt"]


@pytest.mark.parametrize(
    "suffix", [".jpg", ".JPG", ".Jpeg", ".jpe", ".PNG", ".webp", ".WebP", ".gif", ".bmp", ".TIF", ".tiff", ".ppm"]
)
def test_image_suffixes_in_any_case(tmp_path: Path, suffix: str) -> None:
    """Common suffixes of images, in the mixtures of case that cameras and people write."""
    assert relative(scan_folder(touch(tmp_path, f"a{suffix}", "a.TXT"))) == [(f"a{suffix}", "a.TXT")]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.npy", "a.mp4", "a.pdf", "a.eps", "a.zip", "a", "a.jpg.part"])
def test_other_files_are_counted_and_left_alone(tmp_path: Path, name: str) -> None:
    """What is neither picture nor caption makes no pair and no lone file, but counts as a file."""
    scan = scan_folder(touch(tmp_path, name, "a.txt"))
    assert (scan.num_files, scan.pairs, scan.lone_images, scan.lone_captions) == (2, [], [], ["a.txt"])


def test_hidden_files_and_macosx_are_passed_over(tmp_path: Path) -> None:
    """What an archive from a Mac and a version control system leave behind is not counted, paired or ambiguous."""
    touch(tmp_path, "a.jpg", "a.txt", "._a.jpg", ".a.txt", ".git/a.jpg", "__MACOSX/a.jpg", "u/__MACOSX/a.txt")
    scan = scan_folder(tmp_path)
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert scan.num_files == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_what_is_no_regular_file_does_no_harm(tmp_path: Path) -> None:
    """A pipe, a dangling link, a folder called x.jpg, a link to the folder above: none is opened, none is a file."""
    touch(tmp_path, "a.jpg", "a.txt", "b.txt", "c.txt", "x.txt", "x.jpg/y.jpg", "x.jpg/y.txt")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    scan = scan_folder(tmp_path)
    assert relative(scan) == [("a.jpg", "a.txt"), ("x.jpg/y.jpg", "x.jpg/y.txt")]
    assert scan.lone_images == []
    assert scan.lone_captions == ["b.txt", "c.txt", "x.txt"]
    assert scan.num_files == 7


def test_a_link_to_an_image_is_an_image(tmp_path: Path) -> None:
    """Data sets are often made of links to files elsewhere."""
    touch(tmp_path, "elsewhere/picture.jpg", "data/a.txt")
    (tmp_path / "data" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "picture.jpg")
    assert relative(scan_folder(tmp_path / "data")) == [("a.jpg", "a.txt")]


def test_a_link_to_itself_does_no_harm(tmp_path: Path) -> None:
    """RELIABILITY 3, symlink loop: a link to itself and two to each other are no files, like a dangling link."""
    touch(tmp_path, "a.jpg", "a.txt", "loop.txt", "there.txt")
    for link, target in (("loop.jpg", "loop.jpg"), ("there.jpg", "back.jpg"), ("back.jpg", "there.jpg")):
        (tmp_path / link).symlink_to(target)
    scan = scan_folder(tmp_path)
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert (scan.lone_images, scan.lone_captions) == ([], ["loop.txt", "there.txt"])
    assert scan.num_files == 4


@pytest.mark.parametrize("locked", ["u/locked", "."])
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str) -> None:
    """RELIABILITY 3, no permission: word for word. The error is put in by hand, since root may read anything."""
    touch(tmp_path, "a.jpg", "a.txt", "u/locked/b.jpg")
    plain = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == tmp_path / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr("train_clip.data.folder.os.scandir", scandir)
    with pytest.raises(UserError) as caught:
        scan_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / locked}: no permission to list this folder. Give it (chmod +rx), or move the folder away."
    )


def test_a_folder_below_one_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission to look at the folder itself: a UserError too. The error is put in by hand, as above."""
    plain = Path.stat

    def stat(path: Path, **how: Any) -> os.stat_result:
        if path == tmp_path / "closed" / "in":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match="closed/in"):
        scan_folder(touch(tmp_path, "closed/in/a.jpg") / "closed" / "in")


def test_lone_files_are_listed_in_order(tmp_path: Path) -> None:
    """Images without captions and the reverse, relative to the folder and sorted."""
    scan = scan_folder(touch(tmp_path, "z.jpg", "b/y.png", "a/x.txt", "w.txt", "a.jpg", "a.txt"))
    assert scan.lone_images == ["b/y.png", "z.jpg"]
    assert scan.lone_captions == ["a/x.txt", "w.txt"]
    assert scan.require_pairs() is scan


def test_the_message_for_no_pairs(tmp_path: Path) -> None:
    """Word for word: what was found, what was expected, what to do."""
    touch(tmp_path, "coco/12.jpg", "coco/13.jpg", "text/a.txt", "notes.md")
    with pytest.raises(UserError) as caught:
        scan_folder(tmp_path).require_pairs()
    assert str(caught.value) == (
        f"{tmp_path}: 0 pairs among 4 files.\n"
        "  Images without a caption: 2, for instance coco/12.jpg (no 12.txt).\n"
        "  Captions without an image: 1, for instance text/a.txt.\n"
        "  A pair shares its stem: cat.jpg and cat.txt, one caption a line. Rename the files so that they do."
    )


@pytest.mark.parametrize(("files", "lines"), [([], 2), (["a.jpg"], 3), (["a.txt"], 3), (["a.md"], 2)])
def test_the_message_for_no_pairs_says_only_what_is_there(tmp_path: Path, files: list[str], lines: int) -> None:
    """No line about lone images or captions where there are none."""
    with pytest.raises(UserError) as caught:
        scan_folder(touch(tmp_path, *files)).require_pairs()
    assert len(str(caught.value).splitlines()) == lines


def test_no_such_folder(tmp_path: Path) -> None:
    """A missing folder and a file in its place are named."""
    touch(tmp_path, "file")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UserError, match="there is no such folder") as caught:
            scan_folder(path)
        assert str(caught.value).startswith(f"{path}: ")


class Listing(list[os.DirEntry[str]]):
    """A folder's entries in an order of one's own, to be used as what ``os.scandir`` returns."""

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries as they come, reversed and shuffled thrice: one scan, by the images' relative paths, listed by hand."""
    touch(tmp_path, "a/b.jpg", "a/b.txt", "a-b.jpg", "a-b.txt", "a.jpg", "a.txt", "B.jpg", "B.txt", "a0.jpg", "a0.txt")
    touch(
        tmp_path, "img/1.jpg", "txt/1.txt", "img/10.jpg", "txt/10.txt", "img/2.jpg", "txt/3.txt", "u/d.jpg", "v/d.txt"
    )
    plain = os.scandir
    scans = [scan_folder(tmp_path)]
    for seed in range(4):

        def scandir(path: Any, seed: int = seed) -> Listing:
            with plain(path) as found:
                entries = Listing(sorted(found, key=lambda entry: entry.name, reverse=True))
            if seed:
                random.Random(seed).shuffle(entries)
            return entries

        with monkeypatch.context() as patch:
            patch.setattr("train_clip.data.folder.os.scandir", scandir)
            scans.append(scan_folder(tmp_path))
    assert all(scan == scans[0] for scan in scans[1:])
    images = [image for image, _ in relative(scans[0])]
    assert images == ["B.jpg", "a-b.jpg", "a.jpg", "a/b.jpg", "a0.jpg", "img/1.jpg", "img/10.jpg", "u/d.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_can_be_paired_and_split(tmp_path: Path) -> None:
    """File names in Latin-1 are stems like any other: four pairs, cut into halves that hold each of them once."""
    for stem in (b"b\xe4r", b"k\xe4se"):
        for suffix in (b".jpg", b".txt"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + stem + suffix)).touch()
    scan = scan_folder(touch(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt"))
    assert len(scan.pairs) == 4
    training, held_out = split_pairs(scan.pairs, tmp_path, 0.5)
    assert len(training) == len(held_out) == 2
    assert sorted(training + held_out, key=scan.pairs.index) == scan.pairs


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs and the same split from within the folder, from above it and by its full path."""
    touch(tmp_path, *(f"data/{index}{suffix}" for index in range(12) for suffix in (".jpg", ".txt")))
    outcomes = []
    for place, folder in ((tmp_path, "data"), (tmp_path / "data", "."), (tmp_path, str(tmp_path / "data"))):
        monkeypatch.chdir(place)
        scan = scan_folder(Path(folder))
        held_out = split_pairs(scan.pairs, Path(folder), 0.25)[1]
        outcomes.append((relative(scan), [Path(pair.image).name for pair in held_out]))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(outcomes[0][1]) == 3


def made_up_pairs(folder: Path, number: int) -> list[Pair]:
    """Pairs that lie nowhere: splitting reads names alone."""
    return [Pair(str(folder / f"{index % 7}/{index}.jpg"), str(folder / f"{index}.txt")) for index in range(number)]


@pytest.mark.parametrize("number", [1, 2, 9, 10, 11, 100, 1003])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25, 0.5, 0.9])
def test_the_split_has_the_share_that_was_asked_for(number: int, share: float) -> None:
    """Exactly round(share · n) held out, none in place of a single one; nothing twice, both in the list's order."""
    pairs = made_up_pairs(Path("/data"), number)
    training, held_out = split_pairs(pairs, Path("/data"), share)
    wanted = round(share * number)
    assert len(held_out) == (0 if wanted == 1 else wanted)
    assert sorted(training + held_out, key=pairs.index) == pairs
    assert training == [pair for pair in pairs if pair not in held_out]
    assert held_out == sorted(held_out, key=pairs.index)


def test_the_split_depends_on_names_alone() -> None:
    """The same names elsewhere, listed in another order, or among fewer that stay: the same are held out."""
    here, there = Path("/data"), Path("/mnt/disk 2/copy")
    first = {Path(pair.image).relative_to(here) for pair in split_pairs(made_up_pairs(here, 200), here, 0.2)[1]}
    shuffled = made_up_pairs(there, 200)
    random.Random(0).shuffle(shuffled)
    second = {Path(pair.image).relative_to(there) for pair in split_pairs(shuffled, there, 0.2)[1]}
    assert first == second
    smaller = {Path(pair.image).relative_to(here) for pair in split_pairs(made_up_pairs(here, 200), here, 0.1)[1]}
    assert smaller < first


def test_the_split_is_spread_over_the_folder() -> None:
    """A fifth of 1,400 pairs in 7 subfolders: 40 expected of each, and at most 4 deviations (5.7) more or less."""
    folder = Path("/data")
    held_out = split_pairs(made_up_pairs(folder, 1400), folder, 0.2)[1]
    for subfolder in range(7):
        count = sum(Path(pair.image).parent.name == str(subfolder) for pair in held_out)
        assert abs(count - 40) < 23


def test_a_folder_that_was_moved_splits_alike(tmp_path: Path) -> None:
    """Scan and split on disk, move the folder, and again: the held-out names are the same."""
    touch(tmp_path, *(f"old/{index}{suffix}" for index in range(20) for suffix in (".png", ".txt")))
    before = split_pairs(scan_folder(tmp_path / "old").pairs, tmp_path / "old", 0.3)[1]
    shutil.move(tmp_path / "old", tmp_path / "new")
    after = split_pairs(scan_folder(tmp_path / "new").pairs, tmp_path / "new", 0.3)[1]
    assert [Path(pair.image).name for pair in before] == [Path(pair.image).name for pair in after]
    assert len(before) == 6
