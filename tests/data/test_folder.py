"""Pairing by stem: against layouts whose pairs are plain to see, and against a recursive restatement of the rule."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_clip.data.folder import scan_folder
from train_clip.data.pairs import split_pairs
from train_clip.data.scan import Scan
from train_clip.errors import UserError


def touch(folder: Path, *names: str) -> Path:
    """Make empty files: the scan reads names alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def relative(scan: Scan) -> list[tuple[str, str]]:
    """The pairs below the folder."""
    return [
        (Path(pair.image).relative_to(scan.source).as_posix(), Path(pair.caption).relative_to(scan.source).as_posix())
        for pair in scan.pairs
    ]


def the_fault(scan: Scan) -> str:
    """The only fault."""
    (fault,) = scan.faults
    return fault


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
    assert scan.num_entries == len(files)
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
            assert "it is not clear which files form a pair" in the_fault(scan_folder(folder))
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
    scan = scan_folder(touch(tmp_path, "unrelated.jpg", "unrelated.txt", *files))
    message = the_fault(scan)
    assert relative(scan) == [("unrelated.jpg", "unrelated.txt")]
    with pytest.raises(UserError) as caught:
        scan.require_pairs()
    assert str(caught.value) == message
    for file in files:
        assert f"\n  {file}\n" in message
    assert "unrelated" not in message
    assert "Rename or remove" in message


AMBIGUOUS = {
    "two images, one caption": (["a.jpg", "a.png", "a.txt"], ["  x/a.jpg", "  x/a.png", "  x/a.txt"]),
    "one image, two captions": (["a.jpg", "u/a.txt", "v/a.txt"], ["  x/a.jpg", "  x/u/a.txt", "  x/v/a.txt"]),
    "three of each": (
        ["1/a.jpg", "2/a.jpg", "3/a.jpg", "4/a.txt", "5/a.txt", "6/a.txt"],
        ["  x/1/a.jpg", "  x/2/a.jpg", "  x/3/a.jpg", "  x/4/a.txt", "  x/5/a.txt", "  x/6/a.txt"],
    ),
    "more than are named": (
        ["a.jpg", "a.jpeg", "a.png", "a.bmp", "a.gif", "4/a.txt", "3/a.txt", "2/a.txt", "1/a.txt"],
        ["  x/1/a.txt", "  x/2/a.txt", "  x/3/a.txt", "  x/4/a.txt", "  x/a.bmp", "  x/a.gif", "  …"],
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_the_message_for_an_ambiguous_stem(tmp_path: Path, case: str) -> None:
    """Word for word: the place, how many share the stem, six of them in order, what to do."""
    files, listed = AMBIGUOUS[case]
    assert the_fault(scan_folder(touch(tmp_path / "x", *files).parent)).splitlines() == [
        f"{tmp_path / 'x'}: the stem a is in {len(files)} names, so it is not clear which files form a pair:",
        *listed,
        "  Expected one image and one caption, and at most one array in npz/. Rename or remove the others.",
    ]


def test_two_images_without_any_caption_are_lone_not_ambiguous(tmp_path: Path) -> None:
    """cat.jpg beside cat.png stops nothing while no caption could belong to both."""
    scan = scan_folder(touch(tmp_path, "cat.jpg", "cat.png", "u/dog.txt", "v/dog.txt", "a.jpg", "a.txt"))
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert scan.lone_images == ["cat.jpg", "cat.png"]
    assert scan.lone_captions == ["u/dog.txt", "v/dog.txt"]


@pytest.mark.parametrize(
    "suffix",
    [
        ".jpg",
        ".JPG",
        ".Jpeg",
        ".jpe",
        ".PNG",
        ".webp",
        ".WebP",
        ".gif",
        ".bmp",
        ".TIF",
        ".tiff",
        ".ppm",
        ".mpo",
        ".JFIF",
    ],
)
def test_image_suffixes_in_any_case(tmp_path: Path, suffix: str) -> None:
    """Common suffixes of images, in the mixtures of case that cameras and people write."""
    assert relative(scan_folder(touch(tmp_path, f"a{suffix}", "a.TXT"))) == [(f"a{suffix}", "a.TXT")]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.npy", "a.mp4", "a.pdf", "a.eps", "a.zip", "a", "a.jpg.part"])
def test_other_files_are_counted_and_left_alone(tmp_path: Path, name: str) -> None:
    """What is neither picture nor caption makes no pair and no lone file, but counts as a file."""
    scan = scan_folder(touch(tmp_path, name, "a.txt"))
    assert (scan.num_entries, scan.pairs, scan.lone_images, scan.lone_captions) == (2, [], [], ["a.txt"])


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    """By hand: suffixes in lower case, their last dot's, and files without any; hidden files are none."""
    touch(tmp_path, "a.jpg", "a.txt", "b.HEIC", "u/c.heic", "d.json", "e.tar.gz", "README", "Makefile", ".hidden")
    scan = scan_folder(tmp_path)
    assert dict(scan.others) == {".heic": 2, ".json": 1, ".gz": 1, "no suffix": 2}
    assert (relative(scan), scan.num_entries) == ([("a.jpg", "a.txt")], 8)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems hold one form of a name only")
def test_accents_apart_and_together_are_one_stem(tmp_path: Path) -> None:
    """An image from a Mac (NFD) and a caption from elsewhere (NFC), and the reverse; two images are too many."""
    apart, together = (unicodedata.normalize(form, "Bär é 한") for form in ("NFD", "NFC"))
    assert apart != together
    scan = scan_folder(touch(tmp_path, f"u/{apart}.jpg", f"u/{together}.txt", f"v/{together}.jpg", f"v/{apart}.txt"))
    assert relative(scan) == [
        (f"u/{apart}.jpg", f"u/{together}.txt"),
        (f"v/{together}.jpg", f"v/{apart}.txt"),
    ]
    assert scan.faults == []
    touch(tmp_path, f"v/{apart}.jpg")
    assert "the stem Bär é 한 is in 3 names" in the_fault(scan_folder(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems hold one form of a name only")
def test_the_order_is_the_same_whatever_form_accents_have(tmp_path: Path) -> None:
    """The same names in NFC and in NFD, among others that sort between their forms: one order, one split."""
    stems = ["a", "b", "e", "é", "f", "z", "ä", "ö", "ß", *(f"é{number}" for number in range(30))]
    orders, splits = [], []
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, stem) for stem in stems]
        files = (f"{name}{suffix}" for name in names for suffix in (".jpg", ".txt"))
        pairs = scan_folder(touch(tmp_path / form, *files)).pairs
        orders.append([unicodedata.normalize("NFC", name) for name in pairs.names])
        splits.append([unicodedata.normalize("NFC", name) for name in split_pairs(pairs, 0.3)[1].names])
    assert orders[0] == orders[1] == sorted(f"{stem}.jpg" for stem in stems)
    assert splits[0] == splits[1]


def test_hidden_files_and_macosx_are_passed_over(tmp_path: Path) -> None:
    """What an archive from a Mac and a version control system leave behind is not counted, paired or ambiguous."""
    touch(tmp_path, "a.jpg", "a.txt", "._a.jpg", ".a.txt", ".git/a.jpg", "__MACOSX/a.jpg", "u/__MACOSX/a.txt")
    scan = scan_folder(tmp_path)
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert scan.num_entries == 2


ODD = "expected a readable regular file (chmod +r; chmod +x a folder). Rename or remove it."


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_what_is_no_regular_file_is_a_fault(tmp_path: Path) -> None:
    """RELIABILITY 3: a pipe, a socket, a device, a dangling link, folders of such names: none is opened, each named."""
    touch(tmp_path, "a.jpg", "a.txt", "b.txt", "c.txt", "x.txt", "x.jpg/y.jpg", "x.jpg/y.txt", "notes.TXT/a.md")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket has to be short.
        with contextlib.chdir(tmp_path):
            server.bind("s.gif")
        scan = scan_folder(tmp_path)
    assert sorted(scan.faults) == [
        f"{tmp_path / 'b.jpg'}: is not a regular file; {ODD}",
        f"{tmp_path / 'c.jpg'}: does not exist, or is a link to a missing file; {ODD}",
        f"{tmp_path / 'notes.TXT'}: is not a regular file; {ODD}",
        f"{tmp_path / 'null.png'}: is not a regular file; {ODD}",
        f"{tmp_path / 's.gif'}: is not a regular file; {ODD}",
        f"{tmp_path / 'x.jpg'}: is not a regular file; {ODD}",
    ]
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert (scan.lone_images, scan.lone_captions) == ([], ["b.txt", "c.txt", "x.txt"])
    assert scan.num_entries == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_what_is_no_regular_file_under_another_name_does_no_harm(tmp_path: Path) -> None:
    """Pipes and dangling links that neither image nor caption is called: no fault, no file, not among the others."""
    touch(tmp_path, "a.jpg", "a.txt")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    scan = scan_folder(tmp_path)
    assert (relative(scan), scan.num_entries) == ([("a.jpg", "a.txt")], 2)
    assert (scan.faults, dict(scan.others), scan.folder_links) == ([], {}, [])


def test_a_link_to_an_image_is_an_image(tmp_path: Path) -> None:
    """Data sets are often made of links to files elsewhere."""
    touch(tmp_path, "elsewhere/picture.jpg", "data/a.txt")
    (tmp_path / "data" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "picture.jpg")
    assert relative(scan_folder(tmp_path / "data")) == [("a.jpg", "a.txt")]


def test_a_link_to_itself_is_a_fault(tmp_path: Path) -> None:
    """RELIABILITY 3, symlink loop: a link to itself and two to each other are named, like a dangling link."""
    touch(tmp_path, "a.jpg", "a.txt", "loop.txt", "there.txt")
    for link, target in (("loop.jpg", "loop.jpg"), ("there.jpg", "back.jpg"), ("back.jpg", "there.jpg")):
        (tmp_path / link).symlink_to(target)
    scan = scan_folder(tmp_path)
    for name, fault in zip(("back.jpg", "loop.jpg", "there.jpg"), sorted(scan.faults), strict=True):
        assert fault.startswith(f"{tmp_path / name}: cannot be looked up (") and "symbolic links" in fault
        assert fault.endswith(ODD)
    assert relative(scan) == [("a.jpg", "a.txt")]
    assert (scan.lone_images, scan.lone_captions) == ([], ["loop.txt", "there.txt"])
    assert scan.num_entries == 4


def test_links_to_folders_are_listed_and_not_followed(tmp_path: Path) -> None:
    """A link to the folder above, which has no end, and one elsewhere: no pair from there, both listed in order."""
    touch(tmp_path, "elsewhere/e.jpg", "elsewhere/e.txt", "data/a.jpg", "data/a.txt", "data/u/b.jpg")
    data = tmp_path / "data"
    (data / "up").symlink_to(data, target_is_directory=True)
    (data / "u" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    scan = scan_folder(data)
    assert scan.folder_links == ["u/more", "up"]
    assert (relative(scan), scan.num_entries, scan.faults) == ([("a.jpg", "a.txt")], 3, [])


def test_a_folder_of_nothing_but_links_says_so(tmp_path: Path) -> None:
    """Word for word: 0 pairs, how many links, an example, what to do."""
    touch(tmp_path, "elsewhere/e.jpg", "elsewhere/e.txt", "data/read.me")
    for link in ("train", "test"):
        (tmp_path / "data" / link).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(UserError) as caught:
        scan_folder(tmp_path / "data").require_pairs()
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'data'}: 0 pairs among 1 files.",
        "  Links to folders, which are not followed: give their targets instead: 2, for instance test.",
        "  Neither images nor captions: 1 × .me.",
        RENAME,
    ]


def test_a_folder_that_is_itself_a_link_is_searched(tmp_path: Path) -> None:
    """The folder that was given may be a link: it is the person's own word."""
    touch(tmp_path, "elsewhere/e.jpg", "elsewhere/e.txt")
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert relative(scan_folder(tmp_path / "data")) == [("e.jpg", "e.txt")]


def test_a_link_to_a_folder_under_the_name_of_an_image_is_named(tmp_path: Path) -> None:
    """RELIABILITY 3, folder called x.jpg: through a link it is no more of a file, and is named somewhere."""
    touch(tmp_path, "elsewhere/e.md", "data/a.jpg", "data/a.txt")
    (tmp_path / "data" / "x.jpg").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    scan = scan_folder(tmp_path / "data")
    assert any("x.jpg" in named for named in [*scan.faults, *scan.folder_links])
    assert "x.jpg" not in scan.lone_images


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
    scan = scan_folder(tmp_path)
    assert the_fault(scan) == (
        f"{tmp_path / locked}: no permission to list this folder. Allow it (chmod +rx), or move the folder away."
    )
    assert relative(scan) == ([("a.jpg", "a.txt")] if locked != "." else [])
    with pytest.raises(UserError, match="no permission to list this folder"):
        scan.require_pairs()


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RELIABILITY 3, no permission: word for word, and only where a run would read. The answer is put in by hand."""
    touch(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt", "u/notes.md")
    monkeypatch.setattr("train_clip.data.scan.os.access", lambda path, *_, **__: Path(path).name in ("a.jpg", "a.txt"))
    scan = scan_folder(tmp_path)
    assert sorted(scan.faults) == [
        f"{tmp_path / name}: no permission to read this file; {ODD}" for name in ("b.jpg", "b.txt")
    ]
    assert (relative(scan), scan.lone_images, scan.lone_captions) == ([("a.jpg", "a.txt")], [], [])


def test_somebody_else(open_folder: Path, as_nobody: Callable[..., None]) -> None:
    """A process that may not read everything: folders, files and links without permission, each in its own words."""
    touch(open_folder, "a.jpg", "a.txt", "b.jpg", "b.txt", "shut/c.jpg", "shut/c.txt", "d.txt", "e.txt")
    (open_folder / "d.jpg").symlink_to(open_folder / "shut" / "c.jpg")
    (open_folder / "e.jpg").symlink_to(open_folder / "b.jpg")
    (open_folder / "away").symlink_to(open_folder / "shut" / "in", target_is_directory=True)
    (open_folder / "b.jpg").chmod(0)
    (open_folder / "shut").chmod(0)
    read = f"no permission to read this file; {ODD}"

    def look() -> None:
        scan = scan_folder(open_folder)
        assert sorted(scan.faults) == [
            f"{open_folder / 'b.jpg'}: {read}",
            f"{open_folder / 'd.jpg'}: no permission to open its folder; {ODD}",
            f"{open_folder / 'e.jpg'}: {read}",
            f"{open_folder / 'shut'}: no permission to list this folder. Allow it (chmod +rx), or move the folder "
            "away.",
        ]
        assert (relative(scan), scan.lone_captions) == ([("a.jpg", "a.txt")], ["b.txt", "d.txt", "e.txt"])
        with pytest.raises(UserError, match="no permission to open its parent folder"):
            scan_folder(open_folder / "shut" / "in")

    as_nobody(look)


def test_somebody_else_in_a_folder_that_may_be_listed_but_not_entered(
    open_folder: Path, as_nobody: Callable[..., None]
) -> None:
    """Names without their files: each is a fault that names it, and none is paired."""
    touch(open_folder, "a.jpg", "a.txt", "half/b.jpg", "half/b.txt", "half/in/c.jpg", "half/notes.md")
    (open_folder / "half").chmod(0o444)

    def look() -> None:
        scan = scan_folder(open_folder)
        named = [fault.partition(": ")[0] for fault in scan.faults]
        assert sorted(named) == [str(open_folder / "half" / name) for name in ("b.jpg", "b.txt", "in")]
        assert relative(scan) == [("a.jpg", "a.txt")]
        assert (scan.lone_images, scan.lone_captions) == ([], [])

    as_nobody(look)


@pytest.mark.parametrize("number", [1, 4, 5, 6, 30])
def test_all_faults_are_collected_and_the_first_five_are_named(tmp_path: Path, number: int) -> None:
    """Dangling links beside pairs: a fault each; the error is the first five of them and the number of the others."""
    touch(tmp_path, "a.jpg", "a.txt")
    for index in range(number):
        (tmp_path / f"{index:02}.jpg").symlink_to("nowhere")
    scan = scan_folder(tmp_path)
    assert sorted(scan.faults) == [
        f"{tmp_path / f'{index:02}.jpg'}: does not exist, or is a link to a missing file; {ODD}"
        for index in range(number)
    ]
    assert relative(scan) == [("a.jpg", "a.txt")]
    with pytest.raises(UserError) as caught:
        scan.require_pairs()
    more = [f"and {number - 5} more: `train-clip data check` lists all."] if number > 5 else []
    assert str(caught.value).splitlines() == scan.faults[:5] + more


def test_several_kinds_of_faults_are_all_collected(tmp_path: Path) -> None:
    """Two ambiguous stems, a folder called x.png, a dangling link: four faults, and the one good pair."""
    touch(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.png", "b.txt", "u/c.jpg", "u/c.txt", "u/v/c.jpg", "x.png/y.md")
    touch(tmp_path, "d/e.jpg", "d/e.txt", "d/e.jpeg")
    (tmp_path / "f.txt").symlink_to("nowhere")
    scan = scan_folder(tmp_path)
    places = sorted(fault.partition(":")[0] for fault in scan.faults)
    assert places == sorted(str(tmp_path / name) for name in ("", "d", "f.txt", "u", "x.png"))
    assert relative(scan) == [("a.jpg", "a.txt")]


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


RENAME = (
    "  The files of a pair share a stem: cat.jpg and cat.txt, one caption per line. Rename the files, or list them in "
    "a table (--pairs). If they share a number (image1.jpg, text1.txt), pass --pair_by number."
)


def test_the_message_for_no_pairs(tmp_path: Path) -> None:
    """Word for word: what was found, what was expected, what to do."""
    touch(tmp_path, "coco/12.jpg", "coco/13.jpg", "text/a.txt", "notes.md")
    with pytest.raises(UserError) as caught:
        scan_folder(tmp_path).require_pairs()
    assert str(caught.value) == (
        f"{tmp_path}: 0 pairs among 4 files.\n"
        "  Images without a caption: 2, for instance coco/12.jpg.\n"
        "  Captions without an image: 1, for instance text/a.txt.\n"
        "  Neither images nor captions: 1 × .md.\n"
        f"{RENAME}"
    )


@pytest.mark.parametrize(("files", "lines"), [([], 2), (["a.jpg"], 3), (["a.txt"], 3), (["a.md"], 3)])
def test_the_message_for_no_pairs_says_only_what_is_there(tmp_path: Path, files: list[str], lines: int) -> None:
    """No line about lone images or captions where there are none."""
    with pytest.raises(UserError) as caught:
        scan_folder(touch(tmp_path, *files)).require_pairs()
    assert len(str(caught.value).splitlines()) == lines


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (["0.tar", "1.tar"], "2 × .tar. Shards (tars of images and captions) are read by --shards."),
        (["a.parquet"], "1 × .parquet. Parquet files that hold images are read by --dataset."),
        (["a.jpg", "b.png", "captions.csv"], "1 × .csv. A table of image paths and captions is read by --pairs TABLE."),
        (["a.jpg", "captions.JSON"], "1 × .json. Save image paths and captions as a table"),
        (["a.md", "b.tar", "c.md"], "2 × .md, 1 × .tar. Shards"),
    ],
)
def test_what_lies_in_place_of_pairs(tmp_path: Path, files: list[str], line: str) -> None:
    """Shards, tables and archives are named, and what makes pairs of them."""
    with pytest.raises(UserError) as caught:
        scan_folder(touch(tmp_path, *files)).require_pairs()
    assert str(caught.value).splitlines()[-2].startswith(f"  Neither images nor captions: {line}")


def test_no_such_folder(tmp_path: Path) -> None:
    """A missing folder and a file in its place are named; of an archive or a table, what reads it."""
    touch(tmp_path, "file", "data.tar", "pairs.csv")
    expected = "Expected images and captions (.txt); for a table use --pairs."
    for name, found, advice in (
        ("missing", "there is no such folder", ""),
        ("missing.tar", "there is no such folder", ""),
        ("file", "is no folder", ""),
        ("data.tar", "is no folder", " Shards (tars of images and captions) are read by --shards."),
        ("pairs.csv", "is no folder", " A table of image paths and captions is read by --pairs TABLE."),
    ):
        with pytest.raises(UserError) as caught:
            scan_folder(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {found}. {expected}{advice}"


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
    training, held_out = split_pairs(scan.pairs, 0.5)
    assert len(training) == len(held_out) == 2
    assert sorted([*training, *held_out], key=scan.pairs.index) == scan.pairs


def test_faults_do_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dangling links listed as they come and reversed: the same faults in one order, so the same five are named."""
    for index in range(8):
        (tmp_path / f"{index}.jpg").symlink_to("nowhere")
    plain = os.scandir
    faults = []
    for reverse in (False, True):

        def scandir(path: Any, reverse: bool = reverse) -> Listing:
            with plain(path) as found:
                return Listing(sorted(found, key=lambda entry: entry.name, reverse=reverse))

        with monkeypatch.context() as patch:
            patch.setattr("train_clip.data.folder.os.scandir", scandir)
            faults.append(scan_folder(tmp_path).faults)
    assert len(faults[0]) == 8
    assert faults[0] == faults[1]


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs and the same split from within the folder, from above it and by its full path."""
    touch(tmp_path, *(f"data/{index}{suffix}" for index in range(12) for suffix in (".jpg", ".txt")))
    outcomes = []
    for place, folder in ((tmp_path, "data"), (tmp_path / "data", "."), (tmp_path, str(tmp_path / "data"))):
        monkeypatch.chdir(place)
        scan = scan_folder(Path(folder))
        held_out = split_pairs(scan.pairs, 0.25)[1]
        outcomes.append((relative(scan), [Path(pair.image).name for pair in held_out]))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(outcomes[0][1]) == 3
