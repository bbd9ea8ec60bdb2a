"""Tables of pairs: against the folder that they describe, against rows written by hand, and every way to be wrong."""

from __future__ import annotations

import codecs
import csv
import json
import os
import socket
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train_clip.data.folder import scan_folder
from train_clip.data.pairs import split_pairs
from train_clip.data.scan import Scan, scan_source
from train_clip.data.table import scan_table
from train_clip.data.tokenizer import is_empty
from train_clip.data_tools.split import write_table
from train_clip.errors import UserError
from train_clip.options import SourceOptions

COLUMNS = SourceOptions()
Rows = Sequence[tuple[str, Sequence[str]]]
PAIRS = {
    "a.jpg": ["a cat"],
    "u/b.png": ['says "hello", twice', "tab\tand, comma", "'quoted'"],
    "u/ein Bär 猫.jpg": ["ein Bär", "猫"],
    "c.jpg": ["a\u2028line\u2029by\x85any\x0bother\x0cname", "  "],
}


def touch(folder: Path, *names: str) -> Path:
    """Make empty files: the scan looks at names alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_csv(table: Path, rows: Rows, **how: Any) -> Path:
    """As Python's csv module writes it, a row a caption."""
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, **how)
        writer.writerow(["image", "caption"])
        writer.writerows([image, caption] for image, captions in rows for caption in captions)
    return table


def write_jsonl(table: Path, rows: Rows) -> Path:
    """As Python's json module writes it, an object an image."""
    lines = (json.dumps({"image": image, "caption": list(captions)}) for image, captions in rows)
    table.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return table


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    ".csv": write_csv,
    ".tsv": lambda table, rows: write_csv(table, rows, delimiter="\t"),
    ".jsonl": write_jsonl,
}
KINDS = list(WRITERS)


def texts(scan: Scan) -> dict[str, list[str]]:
    """The captions of each image by its name, in order."""
    return {name: pair.captions() for name, pair in zip(scan.pairs.names, scan.pairs, strict=True)}


def scan_text(folder: Path, suffix: str, text: str | bytes, columns: SourceOptions = COLUMNS) -> Scan:
    """Write a table beside ``a.jpg`` and ``b.jpg`` and read it."""
    touch(folder, "a.jpg", "b.jpg")
    table = folder / f"table{suffix}"
    table.write_bytes(text.encode() if isinstance(text, str) else text)
    return scan_table(table, columns)


# What can be read


@pytest.mark.parametrize("suffix", KINDS)
def test_a_table_says_what_its_folder_says(tmp_path: Path, suffix: str) -> None:
    """The same pairs as files and as a table: images, captions, order and split are the folder's."""
    table = WRITERS[suffix](tmp_path / f"t{suffix}", list(PAIRS.items()))
    for image, captions in PAIRS.items():
        touch(tmp_path, image)
        (tmp_path / image).with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")
    folder, table = scan_folder(tmp_path), scan_table(table, COLUMNS)
    assert texts(table) == texts(folder)
    assert [pair.image for pair in table.pairs] == [pair.image for pair in folder.pairs]
    assert list(split_pairs(table.pairs, 0.5)[1].names) == list(split_pairs(folder.pairs, 0.5)[1].names)
    assert (table.faults, table.lone_images, table.lone_captions) == ([], [], [])
    assert (table.source, len(table.pairs)) == (tmp_path / f"t{suffix}", 4)
    assert table.require_pairs() is table


def test_the_three_kinds_say_the_same(tmp_path: Path) -> None:
    """CSV, TSV and JSON lines of the same rows, in any case of the suffix: equal pairs; rows by hand."""
    touch(tmp_path, *PAIRS)
    scans = [
        scan_table(write(tmp_path / f"t{kind}", list(PAIRS.items())), COLUMNS)
        for suffix, write in WRITERS.items()
        for kind in (suffix, suffix.upper())
    ]
    assert all(scan.pairs == scans[0].pairs for scan in scans)
    assert [scan.num_entries for scan in scans] == [8, 8, 8, 8, 4, 4]


@pytest.mark.parametrize("suffix", KINDS)
def test_several_rows_an_image(tmp_path: Path, suffix: str) -> None:
    """Rows of one image anywhere in the table, also as "./a.jpg" and by a detour: its captions, a detour.s last."""
    touch(tmp_path, "a.jpg", "u/b.jpg")
    rows = [
        ("a.jpg", ["1"]),
        ("u/b.jpg", ["2"]),
        ("./a.jpg", ["3"]),
        ("u/../a.jpg", ["4"]),
        ("u//b.jpg", ["5"]),
        ("a.jpg", ["1"]),
    ]
    scan = scan_table(WRITERS[suffix](tmp_path / f"t{suffix}", rows), COLUMNS)
    assert texts(scan) == {"a.jpg": ["1", "3", "1", "4"], "u/b.jpg": ["2", "5"]}
    assert scan.num_entries == 6


def test_captions_of_json_are_one_or_a_list(tmp_path: Path) -> None:
    """Text, lists of text, escapes and further keys: as json.loads reads them."""
    lines = [
        {"image": "a.jpg", "caption": "one", "width": 3, "more": {"caption": ["no"]}},
        {"caption": ["two", "three"], "image": "b.jpg"},
        {"image": "a.jpg", "caption": ["\u00e4 \u2028 \U0001f408"]},
    ]
    scan = scan_text(tmp_path, ".jsonl", "\n\n".join(json.dumps(line) for line in lines) + "\n \n")
    assert texts(scan) == {"a.jpg": ["one", "\u00e4 \u2028 \U0001f408"], "b.jpg": ["two", "three"]}
    assert scan.num_entries == 3


@pytest.mark.parametrize("suffix", KINDS)
def test_column_names_by_option(tmp_path: Path, suffix: str) -> None:
    """Columns of other names in another order, among others that are left alone, one of them twice."""
    if suffix == ".jsonl":
        text = '{"id": 7, "text": "a cat", "split": "x", "file name": "a.jpg", "caption": 3}\n'
    else:
        text = "id,text,split,split,file name,caption\n7,a cat,x,y,a.jpg,3\n".replace(
            ",", "," if suffix == ".csv" else "\t"
        )
    assert texts(scan_text(tmp_path, suffix, text, SourceOptions(image_column="file name", caption_column="text"))) == {
        "a.jpg": ["a cat"]
    }


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [False, True])
def test_marks_and_line_ends(tmp_path: Path, suffix: str, mark: bytes, end: bytes, last: bool) -> None:
    """With or without a byte order mark, LF or CR LF, the last line ended or not, blank lines between: one reading."""
    rows = {"a.jpg": ["a cat", "ein Bär"], "b.jpg": ["a dog"]}
    content = WRITERS[suffix](tmp_path / f"t{suffix}", list(rows.items())).read_bytes()
    lines = content.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    scan = scan_text(tmp_path, suffix, mark + (end + end).join(lines) + end * last)
    assert texts(scan) == rows


@pytest.mark.parametrize("suffix", KINDS)
def test_line_breaks_in_a_caption_become_blanks(tmp_path: Path, suffix: str) -> None:
    """Quoted (CSV, TSV) or escaped (JSON) LF and CR LF: one caption, not several; blanks at its ends are dropped."""
    touch(tmp_path, "a.jpg")
    rows = [("a.jpg", ["one\ntwo\r\nthree", "\n four\n\n", "five"])]
    scan = scan_table(WRITERS[suffix](tmp_path / f"t{suffix}", rows), COLUMNS)
    assert texts(scan) == {"a.jpg": ["one two three", "four", "five"]}


def test_quotes_of_spreadsheets(tmp_path: Path) -> None:
    """A quoted cell with separators, doubled quotes and line breaks, and every cell quoted: by hand."""
    text = '"image","caption"\n"a.jpg","a ""red"" ball, and\na ""blue"" one"\n"b.jpg",6" by 4"\n'
    assert texts(scan_text(tmp_path, ".csv", text)) == {
        "a.jpg": ['a "red" ball, and a "blue" one'],
        "b.jpg": ['6" by 4"'],
    }


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("separator", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
def test_other_separators_belong_to_the_caption(tmp_path: Path, suffix: str, separator: str) -> None:
    """Where ``str.splitlines`` cuts but a caption file does not: raw in the table, kept in the caption."""
    caption = f"a{separator}cat"
    text = {
        ".csv": f"image,caption\na.jpg,{caption}\n",
        ".tsv": f"image\tcaption\na.jpg\t{caption}\n",
        ".jsonl": json.dumps({"image": "a.jpg", "caption": caption}, ensure_ascii=ord(separator) < 32) + "\n",
    }
    assert texts(scan_text(tmp_path, suffix, text[suffix])) == {"a.jpg": [caption]}


@pytest.mark.parametrize("suffix", KINDS)
def test_blank_captions(tmp_path: Path, suffix: str) -> None:
    """An image with blank captions alone is without a caption; beside another caption they are dropped."""
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = [("a.jpg", ["", " \u00a0 "]), ("b.jpg", [" ", "a cat", "\n"]), ("c.jpg", [""])]
    scan = scan_table(WRITERS[suffix](tmp_path / f"t{suffix}", rows), COLUMNS)
    assert texts(scan) == {"b.jpg": ["a cat"]}
    assert (scan.lone_images, scan.lone_captions, scan.faults) == (["a.jpg", "c.jpg"], [], [])


NONE = {"null": "null", "NaN": "NaN", "empty": '""', "a list of null": "[null]", "a list of both": '[null, "", NaN]'}


@pytest.mark.parametrize("name", [*NONE, "no such key"])
def test_captions_that_json_leaves_out(tmp_path: Path, name: str) -> None:
    """What pandas writes for a missing value is an empty cell of a CSV: an image without a caption, and no fault."""
    lines = ['{"image": "a.jpg", "caption": %s}' % NONE.get(name, ""), '{"image": "b.jpg", "caption": [null, "a dog"]}']  # noqa: UP031
    if name not in NONE:
        lines[0] = '{"image": "a.jpg"}'
    for order in (lines, lines[::-1]):
        scan = scan_text(tmp_path, ".jsonl", "\n".join(order))
        assert texts(scan) == {"b.jpg": ["a dog"]}
        assert (scan.lone_images, scan.faults, scan.num_entries) == (["a.jpg"], [], 2)
    cells = scan_text(tmp_path, ".csv", "image,caption\na.jpg,\nb.jpg,a dog\n")
    assert (cells.pairs, cells.lone_images) == (scan.pairs, scan.lone_images)


def test_no_row_has_the_column_of_captions(tmp_path: Path) -> None:
    """A key that no object has is a wrong name, and no data set without captions."""
    with pytest.raises(UserError, match=r"its columns are 'image', 'text'; expected one 'caption'"):
        scan_text(tmp_path, ".jsonl", '{"image": "a.jpg", "text": "a cat"}\n{"image": "b.jpg"}\n')


def test_an_empty_list_of_captions(tmp_path: Path) -> None:
    """``"caption": []``: an image without a caption, and no fault."""
    scan = scan_text(tmp_path, ".jsonl", '{"image": "a.jpg", "caption": []}')
    assert (len(scan.pairs), scan.lone_images, scan.faults) == (0, ["a.jpg"], [])


@pytest.mark.parametrize("suffix", KINDS)
def test_images_that_are_not_there(tmp_path: Path, suffix: str) -> None:
    """No such file, no such folder, a file for a folder, a dangling link: captions without an image, by name."""
    touch(tmp_path, "a.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    gone = ["b.jpg", "u/b.jpg", "a.jpg/b.jpg", "link.jpg", "../b.jpg"]
    rows = [("a.jpg", ["a cat"]), *((name, ["a dog"]) for name in gone)]
    scan = scan_table(WRITERS[suffix](tmp_path / f"t{suffix}", rows), COLUMNS)
    assert texts(scan) == {"a.jpg": ["a cat"]}
    assert (sorted(scan.lone_captions), scan.faults) == (sorted(gone), [])


@pytest.mark.parametrize("suffix", KINDS)
def test_absolute_paths_and_paths_above(tmp_path: Path, suffix: str) -> None:
    """Images elsewhere, by their full path and by "..", and through a link: found."""
    touch(tmp_path, "elsewhere/a.jpg", "elsewhere/b.jpg", "tables/x")
    (tmp_path / "tables" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    rows = [(str(tmp_path / "elsewhere" / "a.jpg"), ["1"]), ("../elsewhere/b.jpg", ["2"]), ("c.jpg", ["3"])]
    scan = scan_table(WRITERS[suffix](tmp_path / "tables" / f"t{suffix}", rows), COLUMNS)
    assert sorted(captions[0] for captions in texts(scan).values()) == ["1", "2", "3"]
    assert all(Path(pair.image).is_file() for pair in scan.pairs)


@pytest.mark.parametrize("table", ["t.csv", "./t.csv", "../{}/t.csv"])
def test_a_relative_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """From within its folder: images are found, under the names that the table's full path gives."""
    touch(tmp_path, *PAIRS)
    whole = scan_table(write_csv(tmp_path / "t.csv", list(PAIRS.items())), COLUMNS)
    monkeypatch.chdir(tmp_path)
    scan = scan_table(Path(table.format(tmp_path.name)), COLUMNS)
    assert texts(scan) == texts(whole)
    assert all(Path(pair.image).is_file() for pair in scan.pairs)


@pytest.mark.parametrize("suffix", KINDS)
def test_the_order_of_rows_does_not_matter(tmp_path: Path, suffix: str) -> None:
    """Images reversed: the same pairs in the order of their names."""
    touch(tmp_path, *PAIRS)
    scans = [
        scan_table(WRITERS[suffix](tmp_path / f"{place}{suffix}", list(PAIRS.items())[::step]), COLUMNS)
        for place, step in (("forth", 1), ("back", -1))
    ]
    assert scans[0].pairs == scans[1].pairs
    assert list(scans[0].pairs.names) == sorted(PAIRS)


@pytest.mark.parametrize("suffix", KINDS)
def test_accents_apart_and_together_sort_and_split_alike(tmp_path: Path, suffix: str) -> None:
    """The same names in NFC and in NFD, images and table alike: one order, one split."""
    names = [f"{stem}.jpg" for stem in ("e", "é", "f", "z", "ä", "ö", "한", *(f"é{number}" for number in range(30)))]
    orders, splits = [], []
    for form in ("NFC", "NFD"):
        formed = [unicodedata.normalize(form, name) for name in names]
        folder = touch(tmp_path / form, *formed)
        pairs = scan_table(WRITERS[suffix](folder / f"t{suffix}", [(name, ["a"]) for name in formed]), COLUMNS).pairs
        orders.append([unicodedata.normalize("NFC", name) for name in pairs.names])
        splits.append([unicodedata.normalize("NFC", name) for name in split_pairs(pairs, 0.3)[1].names])
    assert orders[0] == orders[1] == sorted(names)
    assert splits[0] == splits[1]


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_table_of_the_other_form_finds_its_images(tmp_path: Path, in_table: str, on_disk: str) -> None:
    """A folder from a Mac (NFD) and a table written elsewhere (NFC), or the reverse: as in a folder, one name."""
    touch(tmp_path, unicodedata.normalize(on_disk, "Bär.jpg"))
    rows = [(unicodedata.normalize(in_table, "Bär.jpg"), ["a bear"])]
    scan = scan_table(write_csv(tmp_path / "t.csv", rows), COLUMNS)
    assert [pair.captions() for pair in scan.pairs] == [["a bear"]]
    assert Path(scan.pairs[0].image).is_file()


# Images that are no files


READABLE = "expected a readable regular file (chmod +r; chmod +x a folder)"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
@pytest.mark.parametrize("suffix", KINDS)
def test_what_is_no_regular_file_is_a_fault(tmp_path: Path, suffix: str) -> None:
    """RELIABILITY 3: a pipe, which would block for ever, a socket, folders, a device, links in a circle: each named."""
    touch(tmp_path, "a.jpg", "folder.jpg/x")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        # The path of a socket has to be short.
        patch.chdir(tmp_path)
        server.bind("s.jpg")
        odd = ["folder.jpg", "pipe.jpg", "null.jpg", "s.jpg", "..", "."]
        rows = [(name, ["a cat"]) for name in ("a.jpg", "loop.jpg", *odd)]
        scan = scan_table(WRITERS[suffix](tmp_path / f"t{suffix}", rows), COLUMNS)
    loop = [fault for fault in scan.faults if fault.startswith(f"{tmp_path / 'loop.jpg'}: cannot be looked up (")]
    assert len(loop) == 1
    assert sorted(set(scan.faults) - set(loop)) == sorted(
        f"{os.path.join(tmp_path, name)}: is not a regular file; {READABLE}. Fix or remove its rows."  # noqa: PTH118
        for name in odd
    )
    assert texts(scan) == {"a.jpg": ["a cat"]}
    with pytest.raises(UserError, match="is not a regular file"):
        scan.require_pairs()


def test_an_image_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RELIABILITY 3, no permission: word for word. The answer is put in by hand, since root may read anything."""
    monkeypatch.setattr("train_clip.data.scan.os.access", lambda path, *_, **__: not str(path).endswith("b.jpg"))
    scan = scan_text(tmp_path, ".csv", "image,caption\na.jpg,a\nb.jpg,b\nb.jpg,c\n")
    assert scan.faults == [
        f"{tmp_path / 'b.jpg'}: no permission to read this file; {READABLE}. Fix or remove its rows."
    ]
    assert texts(scan) == {"a.jpg": ["a"]}


def test_somebody_else(open_folder: Path, as_nobody: Callable[..., None]) -> None:
    """A process that may not read everything: an image, one in a folder that may not be entered, in their own words."""
    touch(open_folder, "a.jpg", "b.jpg", "shut/c.jpg")
    rows = [(name, ["a cat"]) for name in ("a.jpg", "b.jpg", "shut/c.jpg")]
    tables = [write(open_folder / f"t{suffix}", rows) for suffix, write in WRITERS.items()]
    (open_folder / "b.jpg").chmod(0)
    (open_folder / "shut").chmod(0)

    def look() -> None:
        for table in tables:
            scan = scan_table(table, COLUMNS)
            assert scan.faults == [
                f"{open_folder / 'b.jpg'}: no permission to read this file; {READABLE}. Fix or remove its rows.",
                f"{open_folder / 'shut/c.jpg'}: no permission to open its folder; {READABLE}. Fix or remove its rows.",
            ]
            assert texts(scan) == {"a.jpg": ["a cat"]}

    as_nobody(look)


@pytest.mark.parametrize("where", ["table", "folder"])
def test_a_table_that_may_not_be_read(open_folder: Path, as_nobody: Callable[..., None], where: str) -> None:
    """No permission to read the table, or to look into its folder: a UserError that names it."""
    touch(open_folder, "in/a.jpg")
    table = write_csv(open_folder / "in" / "t.csv", [("a.jpg", ["a cat"])])
    (table if where == "table" else table.parent).chmod(0)

    def look() -> None:
        with pytest.raises(UserError) as caught:
            scan_table(table, COLUMNS)
        assert str(caught.value).startswith(f"{table}: ")
        assert "permission" in str(caught.value)

    as_nobody(look)


# What is wrong with a table


def test_no_such_table(tmp_path: Path) -> None:
    """Missing, a folder, a pipe: word for word, and without waiting for the pipe."""
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    expected = "Expected a table (.csv, .tsv, .jsonl); for a folder of images and captions use --folder."
    gone, odd = "does not exist, or is a link to a missing file", "is not a regular file"
    for name, fault in {
        "missing.csv": gone, "missing": gone, "pipe.csv/t.csv": gone, "folder.csv": odd, "pipe.csv": odd
    }.items():  # fmt: skip
        with pytest.raises(UserError) as caught:
            scan_table(tmp_path / name, COLUMNS)
        assert str(caught.value) == f"{tmp_path / name}: {fault}. {expected}"


@pytest.mark.parametrize(
    ("name", "advice"),
    {
        "t": "", ".csv": "", "t.txt": "", "t.json": "Save", "t.xlsx": "Save", "t.csv.gz": "Archives are not read",
        "t.parquet": "Parquet files that hold images are read by --dataset.",
    }.items(),
)  # fmt: skip
def test_a_kind_that_is_not_known(tmp_path: Path, name: str, advice: str) -> None:
    """The file, the kinds that are read, and what makes one of them of it."""
    with pytest.raises(UserError) as caught:
        scan_table(touch(tmp_path, name) / name, COLUMNS)
    first = (
        f"{tmp_path / name}: is no table that is read here. Expected a table (.csv, .tsv, .jsonl); for a folder of "
        "images and captions use --folder."
    )
    assert str(caught.value).startswith(f"{first} {advice}" if advice else first)
    assert bool(advice) == (str(caught.value) != first)


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize(
    "content",
    ["image,caption\na.jpg,x\n".encode("utf-16"), b"image,caption\na.jpg,ein B\xe4r\n", b"\xff\xd8\xff\xe0", b"ab\xc3"],
    ids=["UTF-16", "Latin-1", "a JPEG", "cut within a letter"],
)
def test_a_table_that_is_not_utf8(tmp_path: Path, suffix: str, content: bytes) -> None:
    """The table, that it is not UTF-8, and what to do; also where the first rows could be read."""
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, suffix, content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / f'table{suffix}'}: is not UTF-8 (")
    assert message.endswith("). Save it as UTF-8.")


ADVICE = "Name the columns with --image_column and --caption_column; the first line of a table holds the column names."
HEADERS = {
    "image,text": ("'image', 'text'", "caption"),
    "caption": ("'caption'", "image"),
    "a.jpg,a cat": ("'a.jpg', 'a cat'", "image"),
    "Image,Caption": ("'Image', 'Caption'", "image"),
    " image, caption": ("' image', ' caption'", "image"),
    "image,caption,caption": ("'image', 'caption', 'caption'", "caption"),
    "image,caption,image": ("'image', 'caption', 'image'", "image"),
    "": ("nothing", "image"),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("header", HEADERS)
def test_columns_that_are_missing_or_there_twice(tmp_path: Path, suffix: str, header: str) -> None:
    """Word for word: the columns that were found, the one that was expected, what to do."""
    found, expected = HEADERS[header]
    text = f"{header}\na.jpg,a cat\n" if header else ""
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, suffix, text.replace(",", "," if suffix == ".csv" else "\t"))
    assert str(caught.value) == (
        f"{tmp_path / f'table{suffix}'}: its columns are {found}; expected one {expected!r}. {ADVICE}"
    )


def test_keys_that_are_missing(tmp_path: Path) -> None:
    """JSON lines whose first object lacks a key: as for columns, word for word."""
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, ".jsonl", '{"url": "a.jpg", "caption": "a cat"}\n')
    assert (
        str(caught.value)
        == f"{tmp_path / 'table.jsonl'}: its columns are 'url', 'caption'; expected one 'image'. {ADVICE}"
    )


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    """Two images or two captions in one object: as two columns of a name, refused or at fault, and none is chosen."""
    for row in (
        '{"image": "a.jpg", "image": "b.jpg", "caption": "x"}',
        '{"image": "a.jpg", "caption": "x", "caption": "y"}',
    ):
        with pytest.raises(UserError, match=r"table\.jsonl"):
            scan_text(tmp_path, ".jsonl", row).require_pairs()


@pytest.mark.parametrize("text", ["", "\n", "\n\n", "image,caption", "image,caption\n", "\ufeffimage,caption\r\n\r\n"])
@pytest.mark.parametrize("suffix", KINDS)
def test_a_table_without_rows(tmp_path: Path, suffix: str, text: str) -> None:
    """Nothing at all, or a header alone: a UserError of the table, at the latest where pairs are required."""
    if suffix == ".jsonl":
        text = text.replace("image,caption", "")
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, suffix, text.replace(",", "\t" if suffix == ".tsv" else ",")).require_pairs()
    assert str(caught.value).startswith(f"{tmp_path / f'table{suffix}'}: ")


def test_the_message_for_no_pairs(tmp_path: Path) -> None:
    """Word for word: rows, images without captions, captions without images, what was expected."""
    rows = "image,caption\na.jpg, \nb.jpg,\nc.jpg,a cat\nu/d.jpg,a dog\nd.jpg,a bird\n"
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, ".csv", rows).require_pairs()
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'table.csv'}: 0 pairs among 5 rows.",
        "  Images without a caption: 2, for instance a.jpg.",
        "  Captions without an image: 3, for instance c.jpg.",
        "  Expected rows with an image and a caption that is not empty; image paths are relative to the table's "
        "folder.",
    ]


PATH, TEXT = "expected the path of an image", "expected text"
EMPTY = f"'image' is empty; {PATH}"
QUOTED = "expected 2, with quotes around text that contains commas"
BROKEN_ROWS = {
    ".csv": {
        "a.jpg": f"has 1 cell; {QUOTED}",
        "a.jpg,a cat,sits": f"has 3 cells; {QUOTED}",
        "b.jpg,,": f"has 3 cells; {QUOTED}",
        ",a cat": EMPTY,
        "  ,a cat": EMPTY,
        "a" * 5_000 + ",a cat": f"'image' has 5,000 bytes; {PATH} of at most 4,096",
    },
    ".jsonl": {
        '{"caption": "a cat"}': EMPTY,
        '{"image": "", "caption": "a cat"}': EMPTY,
        '{"image": " ", "caption": "a cat"}': EMPTY,
        '{"image": null, "caption": "a cat"}': EMPTY,
        '{"image": NaN, "caption": "a cat"}': EMPTY,
        '{"image": [], "caption": "a cat"}': EMPTY,
        "{}": EMPTY,
        '{"image": 3, "caption": "a cat"}': f"'image' is 3; {PATH}",
        '{"image": ["a.jpg"], "caption": "a cat"}': f"'image' is ['a.jpg']; {PATH}",
        '{"image": "a.jpg", "caption": 7}': f"'caption' is 7; {TEXT}",
        '{"image": "a.jpg", "caption": 1e999}': f"'caption' is inf; {TEXT}",
        '{"image": "a.jpg", "caption": {"en": "a cat"}}': f"'caption' is {{'en': 'a cat'}}; {TEXT}",
        '{"image": "a.jpg", "caption": ["a cat", ["a dog"]]}': f"'caption' is ['a dog']; {TEXT}",
        '{"image": "a.jpg", "caption": "' + "a" * 1_048_577 + '"}': (
            f"'caption' has 1,048,577 bytes; {TEXT} of at most 1,048,576"
        ),
        "[]": "is []; expected an object",
        '["a.jpg", "a cat"]': "is ['a.jpg', 'a cat']; expected an object",
        '"a.jpg"': "is 'a.jpg'; expected an object",
        "3": "is 3; expected an object",
        "null": "is None; expected an object",
        "NaN": "is nan; expected an object",
    },
}


@pytest.mark.parametrize(
    ("suffix", "row", "found"),
    [(suffix, row, found) for suffix, rows in BROKEN_ROWS.items() for row, found in rows.items()]
    + [(".tsv", row.replace(",", "\t"), found.replace("commas", "tabs")) for row, found in BROKEN_ROWS[".csv"].items()],
    ids=lambda value: value[:40],
)
@pytest.mark.parametrize("first", [False, True])
def test_rows_that_are_not_whole(tmp_path: Path, suffix: str, row: str, found: str, first: bool) -> None:
    """Too short, too long, without an image, of the wrong types: a fault that names table, line and what was found."""
    good = {".csv": "b.jpg,a dog", ".tsv": "b.jpg\ta dog", ".jsonl": '{"image": "b.jpg", "caption": "a dog"}'}[suffix]
    header = {".csv": ["image,caption"], ".tsv": ["image\tcaption"], ".jsonl": []}[suffix]
    if first and row in ("{}", '{"caption": "a cat"}'):
        pytest.skip("the first object names the columns: see test_keys_that_are_missing")
    lines = [*header, *([row, good] if first else [good, row]), good]
    scan = scan_text(tmp_path, suffix, "\n".join(lines) + "\n")
    assert scan.faults == [
        f"{tmp_path / f'table{suffix}'}, line {lines.index(row) + 1}: {found}. Fix or remove this row."
    ]
    assert texts(scan) == {"b.jpg": ["a dog", "a dog"]}
    assert scan.num_entries == 3
    with pytest.raises(UserError) as caught:
        scan.require_pairs()
    assert str(caught.value) == scan.faults[0]


SHORT = f"has 1 cell; {QUOTED}. Fix or remove this row."


def test_all_broken_rows_are_collected(tmp_path: Path) -> None:
    """Seven short rows among good ones: a fault each, by line; the error names five and counts the rest."""
    text = "image,caption\n" + "a.jpg,a\nb.jpg\n" * 7
    scan = scan_text(tmp_path, ".csv", text)
    assert scan.faults == [f"{tmp_path / 'table.csv'}, line {3 + 2 * row}: {SHORT}" for row in range(7)]
    with pytest.raises(UserError) as caught:
        scan.require_pairs()
    assert str(caught.value).splitlines() == [*scan.faults[:5], "and 2 more: `train-clip data check` lists all."]


def test_the_fault_of_columns_by_option_names_them(tmp_path: Path) -> None:
    """The columns that were asked for, and not the usual names."""
    columns = SourceOptions(image_column="path", caption_column="text")
    (fault,) = scan_text(tmp_path, ".csv", "path,text\n,a cat\n", columns).faults
    assert fault.startswith(f"{tmp_path / 'table.csv'}, line 2: 'path' is empty")


def test_the_line_of_a_row_is_its_first(tmp_path: Path) -> None:
    """Behind a caption of three lines and a blank line, and of a row that has line breaks itself: counted by hand."""
    text = 'image,caption\na.jpg,"a\ncat\nsits"\n\n,"a\ndog"\nb.jpg\n'
    found = [fault.split(": ")[0] for fault in scan_text(tmp_path, ".csv", text).faults]
    assert found == [f"{tmp_path / 'table.csv'}, line {line}" for line in (6, 8)]


@pytest.mark.parametrize(
    ("suffix", "separator", "found"),
    [(".csv", ";", "semicolons"), (".csv", "\t", "tabs"), (".csv", "|", "vertical bars"), (".tsv", ",", "commas")],
)
@pytest.mark.parametrize("header", ["image,caption", "caption,text,image", "a,b", '"image","caption"'])
def test_the_separator_that_a_table_seems_to_have(
    tmp_path: Path, suffix: str, separator: str, found: str, header: str
) -> None:
    """A spreadsheet's of another country, one renamed: what it seems to be separated by, and what to do."""
    text = f"{header}\na.jpg,a cat, and more\n".replace(",", separator)
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, suffix, text)
    own = "tabs" if suffix == ".tsv" else "commas"
    assert str(caught.value) == (
        f"{tmp_path / f'table{suffix}'}: its columns seem to be separated by {found}; expected {own} in a {suffix} "
        "file. Save it with commas as .csv, or with tabs as .tsv."
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("~/a.jpg", "Neither ~ nor variables are expanded"),
        ("$HOME/a.jpg", "Neither ~ nor variables are expanded"),
        ("file:///data/a.jpg", "Write the path without file://."),
        ("https://example.org/a.jpg", "Nothing is downloaded"),
        ("s3://bucket/a.jpg", "Nothing is downloaded"),
        (r"\\server\images\a.jpg", "Separate folders by /"),
        (r"C:\images\a.jpg", "Separate folders by /"),
        (r"images\a.jpg", "Separate folders by /"),
        ("images/a.jpg", ""),
    ],
)
def test_paths_that_mean_nothing_here(tmp_path: Path, name: str, advice: str) -> None:
    """In a table, and as the table or folder itself: what to do with such a path stands beside what is missing."""
    with pytest.raises(UserError) as caught:
        scan_table(write_csv(tmp_path / "t.csv", [(name, ["a cat"]), ("b.jpg", ["a dog"])]), COLUMNS).require_pairs()
    lines = str(caught.value).splitlines()
    assert lines[1] == f"  Captions without an image: 2, for instance {min(name, 'b.jpg')}."
    assert [line.startswith(f"  {advice}") for line in lines[2:-1]] == [True] * bool(advice)
    for scan in (scan_table, scan_folder):
        with pytest.raises(UserError) as caught:
            scan(Path(name), COLUMNS)
        assert str(caught.value).endswith(".") if advice else str(caught.value).endswith(("--folder.", "--pairs."))
        assert advice in str(caught.value)


def test_a_line_that_never_ends(tmp_path: Path) -> None:
    """A line of 20 million characters, as of a whole document: refused, after as much as a row may have."""
    with pytest.raises(UserError, match=r"table\.jsonl, line 1: is over 16,777,216 characters\. Expected one object"):
        scan_text(tmp_path, ".jsonl", '{"image": "a.jpg", "caption": "' + "a" * 20_000_000)


QUOTES = {
    "never closed": ('a.jpg,"a cat\nb.jpg,a dog\n', 2, "a quote that opens in this row is never closed"),
    "text behind it": ('a.jpg,"a "red" ball"\nb.jpg,a dog\n', 2, "text follows the quote that closes a cell"),
    "closed late": ('a.jpg,a cat\nb.jpg,"a dog" and\n', 3, "text follows the quote that closes a cell"),
    "closed by another row": ('a.jpg,"a cat\nb.jpg,"a dog"\n', 2, "text follows the quote that closes a cell"),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("kind", QUOTES)
def test_quotes_that_do_not_fit(tmp_path: Path, suffix: str, kind: str) -> None:
    """The table, the line at which the row begins, what was found, what is expected and how it is mended."""
    text, line, found = QUOTES[kind]
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, suffix, f"image,caption\n{text}".replace(",", "," if suffix == ".csv" else "\t"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / f'table{suffix}'}, line {line}: {found}. ")
    assert message.endswith(
        "Expected quotes around text that contains quotes, separators or line breaks, and quotes inside it "
        'doubled: "a ""red"" ball".'
    )


def test_a_cell_that_never_ends(tmp_path: Path) -> None:
    """An open quote before a long table: where it opens, and that it is not closed."""
    quoted = r"table\.csv, line 2: a quote that opens in this row is never closed"
    long = r"table\.csv, line 2: a cell has over 1,048,576 characters, as where a quote is not closed"
    for number, found in ((20_000, quoted), (200_000, long)):
        with pytest.raises(UserError, match=found):
            scan_text(tmp_path, ".csv", 'image,caption\na.jpg,"a cat\n' + "b.jpg,a dog\n" * number)


@pytest.mark.parametrize(
    "line",
    [
        "image,caption",
        '{"image": "a.jpg", "caption": "a cat"',
        "{'image': 'a.jpg', 'caption': 'a cat'}",
        '{"image": "a.jpg", "caption": "a\tcat"}',
        '{"image": "a.jpg", "caption": "x"} {"image": "b.jpg", "caption": "y"}',
        '{"image": "a.jpg", "caption": "x"},',
        "[" * 100_000,
        '{"image": ' * 100_000,
        '{"image": "a.jpg", "caption": "x", "n": ' + "1" * 5_000 + "}",
        "\x00",
        "\ufeff{}",
    ],
    ids=lambda line: line[:30],
)
def test_a_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    """Cut off, single quotes, two objects, nested without end, a number without end: the table and the line."""
    text = '{"image": "b.jpg", "caption": "a dog"}\n\n' + line + "\n"
    with pytest.raises(UserError) as caught:
        scan_text(tmp_path, ".jsonl", text)
    assert str(caught.value).startswith(f"{tmp_path / 'table.jsonl'}, line 3: is not JSON (")
    assert str(caught.value).endswith("). Expected one object per line.")


def test_a_whole_document_of_json_is_no_lines_of_it(tmp_path: Path) -> None:
    """A list of objects over several lines, the usual mix-up: refused at the first line, with what is expected."""
    rows = [{"image": "a.jpg", "caption": "a cat"}, {"image": "b.jpg", "caption": "a dog"}]
    with pytest.raises(UserError, match=r"line 1: is not JSON .*Expected one object per line"):
        scan_text(tmp_path, ".jsonl", json.dumps(rows, indent=2))
    with pytest.raises(UserError, match=r"line 1: is .*; expected an object"):
        scan_text(tmp_path, ".jsonl", json.dumps(rows)).require_pairs()


@pytest.mark.parametrize("where", ["image", "caption"])
@pytest.mark.parametrize("escape", [r"\ud800", r"\udce4", r"\udcc3\udca9", r"\udfff"])
def test_half_of_a_character_in_json(tmp_path: Path, where: str, escape: str) -> None:
    """Lone surrogates, which JSON can escape and UTF-8 cannot hold: refused by name, or kept as they are."""
    row = {"image": "a.jpg", "caption": "a cat"} | {where: "HALF"}
    text = json.dumps(row).replace("HALF", escape)
    try:
        scan = scan_text(tmp_path, ".jsonl", text).require_pairs()
    except UserError as error:
        assert str(error).startswith(str(tmp_path))
    else:
        assert texts(scan) == {"a.jpg": [json.loads(text)["caption"]]}


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("name", ["a\0b.jpg", "a" * 300, "a/" * 3000])
def test_names_that_no_file_can_have(tmp_path: Path, suffix: str, name: str) -> None:
    """NUL, a name and a path that are too long: a fault that names it, or a caption without an image."""
    touch(tmp_path, "a.jpg")
    scan = scan_table(WRITERS[suffix](tmp_path / f"t{suffix}", [("a.jpg", ["a cat"]), (name, ["a dog"])]), COLUMNS)
    assert texts(scan) == {"a.jpg": ["a cat"]}
    assert len(scan.faults) + len(scan.lone_captions) == 1


def outcome(table: Path) -> Scan | UserError:
    """What a table comes to; any other exception is raised."""
    try:
        scan = scan_table(table, COLUMNS)
    except UserError as error:
        assert str(error).startswith(str(table))
        return error
    for pair in scan.pairs:
        assert pair.captions() if not any("\0" in text for text in pair.texts) else pair.texts
    return scan


PIECES = st.sampled_from(
    ["image", "caption", "a.jpg", ",", "\t", '"', "'", "\n", "\r\n", "\r", " ", "\0", "\ufeff", "{", "}", "[", "]", ":",
     '"image":', '"caption":', '"a.jpg"', "null", "\\ud800", "\\", "é", "\u2028", "/", "..", "1e999"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(suffix=st.sampled_from(KINDS), header=st.booleans(), pieces=st.lists(PIECES | st.text(max_size=5), max_size=30))
def test_any_text(suffix: str, header: bool, pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pieces of tables and other text in any order, below a header or not: a scan or a UserError, nothing else."""
    folder = touch(tmp_path_factory.getbasetemp() / "any", "a.jpg")
    first = {".csv": "image,caption\n", ".tsv": "image\tcaption\n", ".jsonl": '{"image": "a.jpg", "caption": "x"}\n'}
    table = folder / f"text{suffix}"
    table.write_bytes((first[suffix] * header + "".join(pieces)).encode())
    outcome(table)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["a.jpg", "", "\0", "\ud800"])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "caption", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(JSON | st.fixed_dictionaries({"image": st.just("a.jpg") | JSON, "caption": JSON}), max_size=4))
def test_any_json(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Values of any type in any place: a scan or a UserError, nothing else; a row each in a scan."""
    table = touch(tmp_path_factory.getbasetemp() / "any", "a.jpg") / "values.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    found = outcome(table)
    assert isinstance(found, UserError) or found.num_entries == len(rows)


@settings(max_examples=200, deadline=None)
@given(suffix=st.sampled_from(KINDS), content=st.binary(max_size=60))
def test_any_bytes(suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the bytes: a scan or a UserError, nothing else."""
    table = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    table.write_bytes(content)
    outcome(table)


# Writing


CAPTIONS = (
    st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), min_size=1)
    | st.lists(st.sampled_from(["a", '"', ",", "\r", "\t", "'", "\\", "\u2028", " ", ";", "=1"]), min_size=1)
    .map("".join)
).map(str.strip).filter(lambda text: not is_empty(text))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(captions=st.lists(st.lists(CAPTIONS, min_size=1, max_size=3), min_size=1, max_size=4))
@example(captions=[['a "red" ball, and', "a\rb"]])
def test_what_is_written_is_read(captions: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any captions that a caption file can hold, through a table and back: the same, image by image."""
    folder = tmp_path_factory.getbasetemp() / "written"
    names = [f"u/{index}.jpg" for index in range(len(captions))]
    touch(folder, *names)
    write_table(folder / "t.csv", [(str(folder / name), texts) for name, texts in zip(names, captions, strict=True)])
    scan = scan_table(folder / "t.csv", COLUMNS)
    assert scan.faults == []
    assert texts(scan) == dict(zip(names, captions, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "a, b.jpg",
        'a "b".jpg',
        "a\tb.jpg",
        "ein Bär 猫.jpg",
        "a\nb.jpg",
        "a\rb.jpg",
        " a.jpg",
        "'a'.jpg",
        "a;b.jpg",
        "-.jpg",
    ],
)
def test_any_name_is_written_and_read(tmp_path: Path, name: str) -> None:
    """Names with separators, quotes, line breaks, and blanks at their ends: the image is found by its row."""
    touch(tmp_path, name, "b.jpg")
    write_table(tmp_path / "t.csv", [(str(tmp_path / name), ["a cat"]), (str(tmp_path / "b.jpg"), ["a dog"])])
    scan = scan_table(tmp_path / "t.csv", COLUMNS)
    assert texts(scan) == {name: ["a cat"], "b.jpg": ["a dog"]}


def test_images_are_written_relative_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in a folder that is not there yet, of images elsewhere, by full and by relative paths: by hand."""
    touch(tmp_path, "data/u/a.jpg", "data/b.jpg")
    monkeypatch.chdir(tmp_path)
    rows = [(str(tmp_path / "data/u/a.jpg"), ["a cat", "another"]), ("data/b.jpg", ["a dog"])]
    for table in (tmp_path / "out/in/t.csv", Path("out/in/u.csv")):
        write_table(table, iter(rows))
        assert table.read_text(encoding="utf-8") == (
            "image,caption\n../../data/u/a.jpg,a cat\n../../data/u/a.jpg,another\n../../data/b.jpg,a dog\n"
        )
        assert [pair.captions() for pair in scan_table(table, COLUMNS).pairs] == [["a dog"], ["a cat", "another"]]
    write_table(Path("here.csv"), rows)
    assert texts(scan_table(Path("here.csv"), COLUMNS)) == {
        "data/b.jpg": ["a dog"],
        "data/u/a.jpg": ["a cat", "another"],
    }


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Rows that fail half-way, and a name that is not UTF-8: the earlier table stays, and nothing lies beside it."""
    table = tmp_path / "t.csv"
    write_table(table, [(str(tmp_path / "a.jpg"), ["a cat"])])
    before = table.read_bytes()

    def rows() -> Any:
        yield str(tmp_path / "b.jpg"), ["a dog"] * 10_000
        raise KeyError

    with pytest.raises(KeyError):
        write_table(table, rows())
    with pytest.raises(UnicodeEncodeError):
        write_table(table, [(str(tmp_path / "b\udce4r.jpg"), ["a bear"])])
    assert table.read_bytes() == before
    assert list(tmp_path.iterdir()) == [table]


def test_csv_keeps_the_process_limit(tmp_path: Path) -> None:
    """A cell may be as long as a caption file, within the reading alone; also where the table is refused."""
    before = csv.field_size_limit()
    touch(tmp_path, "a.jpg")
    assert texts(scan_text(tmp_path, ".csv", f"image,caption\na.jpg,{'a' * (before + 1)}\n")) == {
        "a.jpg": ["a" * (before + 1)]
    }
    with pytest.raises(UserError):
        scan_text(tmp_path, ".csv", "a,b\n")
    assert csv.field_size_limit() == before


# Folder or table


def test_the_source(tmp_path: Path) -> None:
    """Each alone is what its own scan finds; both, or neither, are refused by name."""
    touch(tmp_path, "a.jpg", "a.txt")
    table = write_csv(tmp_path / "t.csv", [("a.jpg", ["a cat"])])
    assert scan_source(tmp_path, COLUMNS) == scan_folder(tmp_path)
    assert scan_source(None, SourceOptions(pairs=table)) == scan_table(table, COLUMNS)
    with pytest.raises(UserError) as both:
        scan_source(tmp_path, SourceOptions(pairs=table))
    assert str(tmp_path) in str(both.value)
    assert str(table) in str(both.value)
    with pytest.raises(UserError, match=r"^Data from: nowhere\. .*--pairs"):
        scan_source(None, COLUMNS)


def test_two_spellings_of_an_image_are_one(tmp_path: Path) -> None:
    """Blanks around a cell, "./", doubled separators: one image with the captions of all its rows, in order."""
    touch(tmp_path, "u/a.jpg")
    rows = [("u/a.jpg", ["one"]), (" u/a.jpg", ["two"]), ("./u//a.jpg", ["three"])]
    scan = scan_table(write_csv(tmp_path / "t.csv", rows), COLUMNS)
    assert [sorted(pair.captions()) for pair in scan.pairs] == [["one", "three", "two"]]


def test_a_folder_above_a_link_is_the_one_above_what_it_leads_to(tmp_path: Path) -> None:
    """A table that names its images through "link/..", and one written into a folder that is reached by a link."""
    touch(tmp_path, "far/away/data/x", "far/away/a.jpg", "pairs/b.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away" / "data", target_is_directory=True)
    scan = scan_table(write_csv(tmp_path / "t.csv", [("link/../a.jpg", ["one"])]), COLUMNS)
    assert [Path(pair.image).resolve() for pair in scan.pairs] == [tmp_path / "far" / "away" / "a.jpg"]
    write_table(tmp_path / "link" / "t.csv", [(str(tmp_path / "pairs" / "b.jpg"), ["two"])])
    scan = scan_table(tmp_path / "link" / "t.csv", COLUMNS)
    assert [Path(pair.image).resolve() for pair in scan.pairs] == [tmp_path / "pairs" / "b.jpg"]
    write_table(tmp_path / "u.csv", [(f"{tmp_path}/link/../a.jpg", ["three"])])
    scan = scan_table(tmp_path / "u.csv", COLUMNS)
    assert [Path(pair.image).resolve() for pair in scan.pairs] == [tmp_path / "far" / "away" / "a.jpg"]


def test_captions_that_are_blank_to_a_model(tmp_path: Path) -> None:
    """Entities of blanks alone are no caption; beside words they are part of one."""
    touch(tmp_path, "a.jpg", "b.jpg")
    rows = [("a.jpg", ["&nbsp; &#32;", "\u200b", "\x1b[0m"]), ("b.jpg", ["a&nbsp;cat"])]
    scan = scan_table(write_csv(tmp_path / "t.csv", rows), COLUMNS)
    assert (texts(scan), scan.lone_images) == ({"b.jpg": ["a&nbsp;cat"]}, ["a.jpg"])


@pytest.mark.parametrize(
    ("rows", "expected"), [(["u/../z.jpg", "a.jpg", " b.jpg", "./c.jpg"], "abcz"), ([" z.jpg", "a.jpg"], "az")]
)
def test_the_order_is_that_of_the_names_however_they_are_spelled(
    tmp_path: Path, rows: list[str], expected: str
) -> None:
    """A table that takes detours, against one that names its images plainly: the same pairs in the same order."""
    plain = [f"{letter}.jpg" for letter in expected]
    touch(tmp_path, "u/x", *plain)
    scans = [
        scan_table(write_csv(tmp_path / f"{at}.csv", [(name, ["a"]) for name in names]), COLUMNS)
        for at, names in enumerate((plain, rows))
    ]
    assert list(scans[0].pairs.names) == list(scans[1].pairs.names) == plain


def test_rows_of_separators_alone_are_blank_lines(tmp_path: Path) -> None:
    """What spreadsheets leave behind a table: no row, no fault."""
    touch(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text('image,caption\n,\na.jpg,a cat\n,,\n""\n\n', encoding="utf-8")
    scan = scan_table(tmp_path / "t.csv", COLUMNS)
    assert (texts(scan), scan.num_entries, scan.faults) == ({"a.jpg": ["a cat"]}, 1, [])
