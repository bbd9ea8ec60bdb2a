"""`data check`: the report against what was written by hand, figure by figure, and what is kept of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import forked
from tests.conftest import said, write_pairs
from tests.data.everything import LONG, Everything, drawing, encoded, write_everything
from train_clip import cli
from train_clip.data.pairs import PairList
from train_clip.data.tokenizer import Tokenizer
from train_clip.data_tools import facts
from train_clip.data_tools.check import data_check
from train_clip.data_tools.facts import perceptual_hash
from train_clip.data_tools.report import CheckOptions, Report
from train_clip.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "train-clip"


@pytest.fixture
def everything(tmp_path: Path) -> Everything:
    """One of everything, without what stops a run."""
    return write_everything(tmp_path / "everything")


def check(folder: Path, **options: object) -> Report:
    return data_check(folder, options=CheckOptions(**{"max_bad": 1.0, "num_workers": 0} | options))  # type: ignore[arg-type]


def test_one_of_everything(everything: Everything) -> None:
    """Every file of the fixture is in the report for what it is, and nothing else is."""
    folder = everything.folder
    report = check(folder, image_size=16)
    expected: dict[str, list[str]] = {}
    for name, why in everything.bad.items():
        expected.setdefault(why, []).append(str(folder / name))
    assert report["bad"] == {why: sorted(paths) for why, paths in expected.items()}
    assert report["bad_pairs"] == len(everything.bad)
    assert report["pairs"] == len(everything.clean) + len(everything.bad)
    assert {what: (found["number"], found["examples"]) for what, found in report["mended"].items()} == {
        what: (len(names), sorted(names)[:5]) for what, names in everything.mended.items()
    }
    assert (report["lone_images"]["number"], report["lone_images"]["examples"]) == (1, ["lone_image.jpg"])
    assert (report["lone_captions"]["number"], report["lone_captions"]["examples"]) == (1, ["lone_caption.txt"])
    assert report["others"] == {".json": 1, ".heic": 1}
    assert report["entries"] == 2 * report["pairs"] + 4
    assert report["faults"] == report["problems"] == []


def test_captions_of_everything(everything: Everything) -> None:
    """The long line is the one that is cut, by 15 of its 90 tokens; U+2028 and CR LF begin one line and no line."""
    captions = check(everything.folder)["captions"]
    assert captions is not None
    assert (captions["longest"], captions["longest_in"]) == (len(LONG.split()), "long.jpg")
    assert (captions["cut"], captions["tokens_cut"]) == (1, 90 - 75)
    # One line each; CR LF has two. Images that are bad have good captions.
    readable = len(everything.clean) + sum(name.endswith((".jpg", ".png", ".tif")) for name in everything.bad)
    assert captions["lines"] == readable + 1
    assert captions["most_lines"] == 2
    assert (captions["repeated"], captions["repeated_nearly"]) == (0, 0)


def test_what_no_run_begins_with(tmp_path: Path) -> None:
    """Pipes, dead links, a folder called x.jpg and two images of one stem: word for word, and the exit code is 1."""
    folder = write_everything(tmp_path / "everything", faults=True).folder
    with pytest.raises(UserError) as caught:
        check(folder, json=tmp_path / "report.json")
    assert str(caught.value) == f"{folder}: training would fail. 5 faults, listed above."
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    regular = "expected a readable regular file (chmod +r; chmod +x a folder). Rename or remove it."
    assert report["faults"] == [
        f"{folder}/dangling.jpg: does not exist, or is a link to a missing file; {regular}",
        f"{folder}/folder.jpg: is not a regular file; {regular}",
        f"{folder}/loop.jpg: cannot be looked up ([Errno 40] Too many levels of symbolic links: '{folder}/loop.jpg'); "
        f"{regular}",
        f"{folder}/pipe.jpg: is not a regular file; {regular}",
        f"{folder}/twice: the stem cat is in 3 names, so it is not clear which files form a pair:\n"
        "  twice/cat.jpg\n  twice/cat.png\n  twice/cat.txt\n  Expected one image and one caption, and at most one "
        "array in npz/. Rename or remove the others.",
    ]
    assert report["folder_links"] == {"number": 1, "examples": ["above"]}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "check", str(folder), "--max_bad", "1"])
    assert said(stopped).startswith("train-clip: ")


@pytest.mark.parametrize(("max_bad", "stops"), [(0.43, False), (0.41, True), (0.01, True)])
def test_more_bad_pairs_than_may_be(tmp_path: Path, max_bad: float, stops: bool) -> None:
    """Eight pairs in nineteen, 42.1%, against a cap above and below."""
    folder = write_pairs(tmp_path / "pairs", 19)
    for index in range(8):
        (folder / f"{index:03}.png").write_bytes(b"")
    if not stops:
        assert check(folder, max_bad=max_bad)["problems"] == []
        return
    with pytest.raises(UserError, match=r"8 of 19 pairs \(42\.1%\) are unusable, more than --max_bad 0\."):
        check(folder, max_bad=max_bad)


@pytest.mark.parametrize(
    ("number", "problem"), [(0, "fewer than 2 training pairs"), (1, "fewer than 2 training pairs")]
)
def test_too_few_pairs(tmp_path: Path, number: int, problem: str) -> None:
    """Nothing and a single pair: training would not begin."""
    with pytest.raises(UserError, match=problem):
        check(write_pairs(tmp_path / "pairs", number))


def test_a_table_is_checked_like_the_folder(everything: Everything, tmp_path: Path) -> None:
    """The images of the folder out of a table, each with its name for a caption: the same are bad, the same mended."""
    images = [name for name in everything.bad if not name.endswith(".txt")]
    rows = [f"everything/{name},caption of {name}\n" for name in [*everything.clean, *images]]
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(rows), encoding="utf-8")
    report = data_check(options=CheckOptions(pairs=tmp_path / "pairs.csv", max_bad=1.0, num_workers=0))
    of_folder = check(everything.folder)
    assert (report["pairs"], report["entries"], report["bad_pairs"]) == (len(rows), len(rows), len(images))
    of_images = {why: paths for why, paths in of_folder["bad"].items() if not paths[0].endswith(".txt")}
    assert report["bad"] == of_images
    assert {what: found["number"] for what, found in report["mended"].items()} == {
        what: found["number"] for what, found in of_folder["mended"].items() if what.split()[0] not in ("byte", "CR")
    }
    assert report["sizes"] is not None


def test_repeats_and_leaks(tmp_path: Path) -> None:
    """Two equal files, one recompressed, one caption twice, one in capitals; half held out: counted by hand."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    first = encoded(drawing(1, 200, 150), "PNG")
    images = [
        first,
        first,
        encoded(drawing(1, 200, 150), "JPEG", quality=60),
        *(encoded(drawing(seed, 200, 150), "PNG") for seed in (2, 3, 4)),
    ]
    captions = ["a dog", "a cat", "a dog", "A Dog", "a bird", "a fish"]
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        (folder / f"{index}.png").write_bytes(image)
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    report = check(folder, val_share=0.5)
    assert report["repeats"]["equal"] == 2
    assert report["repeats"]["equal_groups"] == [["0.png", "1.png"]]
    assert report["captions"] is not None
    assert (report["captions"]["repeated"], report["captions"]["repeated_nearly"]) == (2, 1)
    assert report["captions"]["most_repeated"] == [[2, "a dog"]]
    held = held_out_names(folder)
    sides = [f"{index}.png" in held for index in range(6)]
    assert report["leaks"]["held_out"] == sum(sides) == 3
    assert report["leaks"]["images"] == int(sides[0] != sides[1])
    dogs = [sides[index] for index in (0, 2, 3)]
    assert report["leaks"]["captions"] == (sum(dogs) if len(set(dogs)) == 2 else 0)
    if perceptual_hash() is None:
        assert report["repeats"]["near"] is report["leaks"]["images_nearly"] is None
    else:
        assert report["repeats"]["near"] == 3
        alike = sides[:3]
        assert report["leaks"]["images_nearly"] == (sum(alike) if len(set(alike)) == 2 else 0)


def test_captions_that_the_cut_makes_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captions that differ in their fourth word, cut at two words and at 75, first the one and then the other.

    Another context length looks again at captions that either cuts, and at no others.
    """
    folder = write_pairs(tmp_path / "pairs", 3)
    for place, caption in enumerate(("one two three four", "One two  three five", "one")):
        (folder / f"{place:03}.txt").write_text(caption)
    looked_at = counted(monkeypatch)
    for context, repeated, places in (
        (4, 2, [0, 1, 2]),
        (77, 0, [0, 1]),
        (4, 2, [0, 1]),
        (3, 3, [0, 1]),
        (77, 0, [0, 1]),
    ):
        looked_at.clear()
        report = check(folder, context_length=context)
        assert (report["captions"]["repeated"], report["captions"]["repeated_nearly"]) == (0, repeated)
        assert looked_at == places


@pytest.mark.parametrize("source", ["folder", "table"])
def test_leaks_between_lists(tmp_path: Path, source: str) -> None:
    """Four pairs to train on, three to validate on: one by the same path, one copied, one of its own; again from the
    store, and after one was mended.
    """  # noqa: D205
    for folder, names in (("a", "1234"), ("b", "56")):
        (tmp_path / folder).mkdir()
        for name in names:
            drawing(int(name), 200, 150).save(tmp_path / folder / f"{name}.png")
            (tmp_path / folder / f"{name}.txt").write_text(f"number {name}")
    (tmp_path / "b" / "5.png").write_bytes((tmp_path / "a" / "2.png").read_bytes())
    val = tmp_path / "val.csv"
    val.write_text("image,caption\na/1.png,other words\nb/5.png,number five\nb/6.png,Number 4\n")
    (tmp_path / "train.csv").write_text("image,caption\n" + "".join(f"a/{n}.png,number {n}\n" for n in "1234"))
    given = {"folder": (tmp_path / "a", {}), "table": (None, {"pairs": tmp_path / "train.csv"})}
    folder, options = given[source]
    for number, images in enumerate((2, 2, 1)):
        if number == 2:
            drawing(7, 200, 150).save(tmp_path / "b" / "5.png")
        report = data_check(folder, options=CheckOptions(val_pairs=val, num_workers=0, **options))  # type: ignore[arg-type]
        assert (
            report["pairs"],
            report["leaks"]["held_out"],
            report["leaks"]["images"],
            report["leaks"]["captions"],
        ) == (7, 3, images, 1)
        assert report["leaks"]["examples"] == [f"{tmp_path}/a/1.png", f"{tmp_path}/b/5.png"][:images]
        assert report["repeats"]["equal"] == 2 * images
    assert report["problems"] == []


def held_out_names(folder: Path) -> set[str]:
    from train_clip.data.folder import scan_folder
    from train_clip.data.pairs import split_pairs

    return {Path(pair.image).name for pair in split_pairs(scan_folder(folder).pairs, 0.5)[1]}


def test_sizes(tmp_path: Path) -> None:
    """Five pictures of known sizes, one of them stored lying: least, median and most of each figure."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for index, (width, height) in enumerate([(100, 50), (300, 200), (64, 64), (80, 240)]):
        drawing(index, width, height).save(folder / f"{index}.png")
    drawing(9, 400, 100).save(folder / "4.jpg", exif=exif)
    for index in range(5):
        (folder / f"{index}.txt").write_text(f"number {index}")
    sizes = check(folder, image_size=100)["sizes"]
    assert sizes is not None
    assert [sizes["width"][at] for at in (0, 2, 4)] == [64, 100, 300]
    assert [sizes["height"][at] for at in (0, 2, 4)] == [50, 200, 400]
    assert [sizes["aspect"][at] for at in (0, 2, 4)] == [1.0, 2.0, 4.0]
    assert sizes["enlarged"] == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(everything: Everything, workers: int) -> None:
    """No processes against one and two: the same report."""
    assert check(everything.folder, cache=False) == check(everything.folder, cache=False, num_workers=workers)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of the pairs that are looked at from here on."""
    looked_at: list[int] = []
    look = facts.audit

    def recorded(pairs: PairList, tokens_of: Tokenizer, place: int) -> object:
        looked_at.append(place)
        return look(pairs, tokens_of, place)

    monkeypatch.setattr(facts, "audit", recorded)
    return looked_at


def test_a_second_look_opens_what_has_changed_alone(
    everything: Everything, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing changed, a file mended, a pair gone, a pair added: the report is that of a look without what was kept."""
    folder = everything.folder
    looked_at = counted(monkeypatch)
    first = check(folder)
    assert len(looked_at) == first["pairs"]
    assert len(list((cache / "scans").glob("everything-*.npz"))) == 1
    looked_at.clear()
    assert check(folder) == first
    assert looked_at == []
    (folder / "blank.txt").write_text("no longer blank")
    for suffix in (".jpg", ".txt"):
        (folder / f"plain{suffix}").unlink()
    (folder / "lone_image.txt").write_text("in company")
    second = check(folder)
    assert len(looked_at) == 2
    looked_at.clear()
    assert second == check(folder, cache=False)
    assert second["bad_pairs"] == first["bad_pairs"] - 1
    assert second["pairs"] == first["pairs"]


def test_captions_of_a_table_that_change_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One caption of three rewritten in the table: that pair alone."""
    write_pairs(tmp_path / "pairs", 3)
    table = tmp_path / "table.csv"
    options = CheckOptions(pairs=table, num_workers=0)
    table.write_text("image,caption\n" + "".join(f"pairs/00{index}.png,say {index}\n" for index in range(3)))
    data_check(options=options)
    looked_at = counted(monkeypatch)
    table.write_text(table.read_text().replace("say 1", "say something"))
    data_check(options=options)
    assert looked_at == [1]


def test_pairs_that_are_in_both_lists_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table to train and to validate on: each of its pairs twice, and none is looked at again."""
    write_pairs(tmp_path / "pairs", 3)
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"pairs/00{index}.png,say {index}\n" for index in range(3)))
    options = CheckOptions(pairs=table, val_pairs=table, num_workers=0)
    looked_at = counted(monkeypatch)
    first = data_check(options=options)
    assert looked_at == [0, 1, 2, 3, 4, 5]
    assert (first["leaks"]["images"], first["leaks"]["captions"]) == (3, 3)
    looked_at.clear()
    assert data_check(options=options) == first
    assert looked_at == []


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4" + bytes(2000)])
def test_a_damaged_store_is_made_anew(tmp_path: Path, cache: Path, content: bytes) -> None:
    """Nothing, text and a broken archive in its place: the same report."""
    folder = write_pairs(tmp_path / "pairs", 4)
    first = check(folder)
    (kept,) = (cache / "scans").iterdir()
    kept.write_bytes(content)
    assert check(folder) == first
    assert len(np.load(kept)["pairs"]) == 4


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A file where the cache's folder should be: a line says so, and the report is there."""
    folder = write_pairs(tmp_path / "pairs", 4)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert check(folder)["pairs"] == 4
    assert "Results cannot be saved in the cache folder" in capsys.readouterr().out


def test_a_store_that_is_damaged_within(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros behind its first two thousand bytes, and a byte flipped: the same report without it, then a new one."""
    folder = write_pairs(tmp_path / "pairs", 40)
    first = check(folder)
    (kept,) = (cache / "scans").iterdir()
    whole = bytearray(kept.read_bytes())
    looked_at = counted(monkeypatch)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:2000] + bytes(len(whole) - 2000), flipped):
        kept.write_bytes(damaged)
        assert check(folder) == first
        assert looked_at == list(range(40))
        assert check(folder) == first
        assert len(looked_at) == 40
        looked_at.clear()


def test_two_checks_at_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one begins and ends within the first: the same report from both, and from what they have kept."""
    folder = write_pairs(tmp_path / "pairs", 6)
    look = facts.audit
    reports: list[Report] = []

    def interposed(pairs: PairList, tokens_of: Tokenizer, place: int) -> object:
        if place == 3 and not reports:
            monkeypatch.setattr(facts, "audit", look)
            reports.append(check(folder))
        return look(pairs, tokens_of, place)

    monkeypatch.setattr(facts, "audit", interposed)
    reports.append(check(folder))
    looked_at = counted(monkeypatch)
    reports.append(check(folder))
    assert reports[0] == reports[1] == reports[2]
    assert looked_at == []
    assert len(list((cache / "scans").iterdir())) == 1


def test_a_store_of_another_format_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept by a Pillow of another version: every pair is looked at again."""
    folder = write_pairs(tmp_path / "pairs", 4)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "0.1")
        first = check(folder)
    looked_at = counted(monkeypatch)
    assert check(folder) == first
    assert looked_at == [0, 1, 2, 3]


def test_what_passes_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that could not be read for a while, and one changed with its size and time kept: both are found."""
    folder = write_pairs(tmp_path / "pairs", 4)
    first = check(folder)
    before = (folder / "001.png").stat()
    with monkeypatch.context() as patch:
        patch.setattr("train_clip.data.images._open", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
        (folder / "000.png").touch()
        assert check(folder)["bad"] == {"image cannot be read (OSError)": [f"{folder}/000.png"]}
    assert check(folder) == first
    (folder / "001.png").write_bytes(bytes(before.st_size))
    os.utime(folder / "001.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check(folder)["bad_pairs"] == 1


def test_several_processes_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, by their numbers: neither is this process."""
    folder = write_pairs(tmp_path / "pairs", 64)
    look = facts.audit

    def noted(pairs: PairList, tokens_of: Tokenizer, place: int) -> object:
        with (tmp_path / "processes").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return look(pairs, tokens_of, place)

    monkeypatch.setattr(facts, "audit", noted)
    check(folder, num_workers=2)
    processes = set((tmp_path / "processes").read_text().split())
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_similar_images_on_both_sides(tmp_path: Path) -> None:
    """Eight pictures to train on, recompressed or in another format to validate on, and one that is like none."""
    if perceptual_hash() is None:
        pytest.skip("needs ImageHash")
    for side in "ab":
        (tmp_path / side).mkdir()
    for index in range(8):
        picture = drawing(index, 200, 150)
        contents = [
            encoded(picture, "PNG"),
            encoded(picture, "BMP") if index < 2 else encoded(picture, "JPEG", quality=40),
        ]
        for side, content in zip("ab" if index % 2 else "ba", contents, strict=True):
            (tmp_path / side / f"{index}.png").write_bytes(content)
    drawing(50, 200, 150).save(tmp_path / "b" / "8.png")
    for side, number in (("a", 8), ("b", 9)):
        rows = [f"{side}/{index}.png,{side} {index}\n" for index in range(number)]
        (tmp_path / f"{side}.csv").write_text("image,caption\n" + "".join(rows))
    options = CheckOptions(pairs=tmp_path / "a.csv", val_pairs=tmp_path / "b.csv", num_workers=0)
    report = data_check(options=options)
    assert (report["repeats"]["equal"], report["repeats"]["near"]) == (0, 16)
    assert (report["leaks"]["images"], report["leaks"]["images_nearly"]) == (0, 8)


def test_a_pair_that_is_bad_twice_is_one_bad_pair(tmp_path: Path) -> None:
    """Image and captions of one pair: two files, one pair."""
    folder = write_pairs(tmp_path / "pairs", 4)
    (folder / "000.png").write_bytes(b"")
    (folder / "000.txt").write_bytes(b"")
    report = check(folder)
    assert report["bad_pairs"] == 1
    assert report["bad"] == {"caption is empty": [f"{folder}/000.txt"], "empty file": [f"{folder}/000.png"]}


def test_nothing_left_to_train_or_validate_on(tmp_path: Path) -> None:
    """Three pairs of four held out, and a table to validate on without rows: training would not begin."""
    folder = write_pairs(tmp_path / "pairs", 4)
    with pytest.raises(UserError, match="fewer than 2 training pairs"):
        check(folder, val_share=0.75)
    (tmp_path / "val.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="no validation pairs"):
        check(folder, val_pairs=tmp_path / "val.csv")


def test_an_interrupted_look_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after 40 of 60 pairs: what was found by then is not looked at again."""
    folder = write_pairs(tmp_path / "pairs", 60)
    looked_at = counted(monkeypatch)
    look = facts.audit

    def interrupted(pairs: PairList, tokens_of: Tokenizer, place: int) -> object:
        if place == 40:
            raise KeyboardInterrupt
        return look(pairs, tokens_of, place)

    with monkeypatch.context() as patch:
        patch.setattr(facts, "audit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(folder)
    looked_at.clear()
    assert check(folder)["pairs"] == 60
    assert looked_at == list(range(32, 60))


KILLED = """
import os, sys
from train_clip import cli
from train_clip.data_tools import facts

look = facts.audit
facts.KEPT_EVERY = 16
facts.audit = lambda pairs, tokens_of, place: os._exit(9) if place == 40 else look(pairs, tokens_of, place)
cli.main(["data", "check", sys.argv[1], "--num_workers", "0"])
"""


def test_a_killed_look_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone without a word after 40 of 60 pairs: what was kept by then is not looked at again."""
    folder = write_pairs(tmp_path / "pairs", 60)
    assert forked.run(["-c", KILLED, str(folder)]).returncode == 9
    looked_at = counted(monkeypatch)
    assert check(folder)["pairs"] == 60
    assert looked_at == list(range(32, 60))


def test_without_the_library_for_perceptual_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says what to install, all else is the same, and the store is taken again once the library is there."""
    folder = write_pairs(tmp_path / "pairs", 4)
    whole = check(folder)
    with monkeypatch.context() as patch:
        for module in ("facts", "report"):
            patch.setattr(f"train_clip.data_tools.{module}.perceptual_hash", lambda: None)
        report = check(folder)
    assert "Similar images were not searched: pip install ImageHash" in capsys.readouterr().out
    assert report["repeats"]["near"] is None
    assert report | {"repeats": whole["repeats"], "leaks": whole["leaks"]} == whole
    assert check(folder) == whole


def test_the_report_in_words_and_for_machines(everything: Everything, tmp_path: Path, capsys) -> None:
    """Every bad file is named on the screen under its reason; the JSON holds the same report."""
    report = check(everything.folder, json=tmp_path / "report.json")
    said = capsys.readouterr().out.splitlines()
    for name, why in everything.bad.items():
        below = said[said.index(f"  {len(report['bad'][why])} × {why}") + 1 :]
        assert f"    {everything.folder / name}" in below
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--image_size 0", "image_size is 0; expected 1 or above"),
        ("--context_length 1", "context_length is 1; expected 2 or above"),
        ("--val_share 1", "val_share is 1.0; expected from 0"),
        ("--num_workers -1", "num_workers is -1; expected 0 or above"),
        ("--json /dev/null", "/dev/null: is not a regular file"),
        ("--json .", ".: is not a regular file"),
        ("--max_bad 2", "max_bad is 2.0; expected from 0 to 1"),
        ("--pairs other.csv", "Expected one of --folder"),
    ],
)
def test_what_cannot_work_is_told_in_a_line(tmp_path: Path, words: str, message: str) -> None:
    """Numbers out of their range, and two sources."""
    folder = write_pairs(tmp_path / "pairs", 3)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "check", str(folder), *words.split()])
    assert message in said(stopped)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A Latin-1 name is looked at, kept and printed with its bytes escaped."""
    folder = write_pairs(tmp_path / "pairs", 2)
    (folder / os.fsdecode(b"b\xe4r.png")).touch()
    (folder / os.fsdecode(b"b\xe4r.txt")).write_text("a bear")
    assert check(folder)["bad"] == {"empty file": [f"{folder}/b\\xe4r.png"]}
    assert check(folder)["bad_pairs"] == 1


def test_what_is_not_read_comes_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Archives beside pairs, and rows whose paths begin in a way that means nothing here, each kind once."""
    folder = write_pairs(tmp_path / "pairs", 4)
    (folder / "more.tar").write_bytes(b"")
    check(folder, image_size=16)
    assert "1 × .tar. Shards (tars of images" in capsys.readouterr().out
    rows = [f"pairs/{index:03}.png,a" for index in range(4)] + ["~/a.png,b", "~/c.png,b", "https://a.b/c.png,d"]
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *rows]))
    data_check(options=CheckOptions(pairs=tmp_path / "table.csv", max_bad=1.0, num_workers=0, image_size=16))
    told = capsys.readouterr().out
    assert told.count("Neither ~ nor variables are expanded") == told.count("Nothing is downloaded") == 1
