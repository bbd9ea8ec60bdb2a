"""Shards are read where they lie in their tars, by their indices or headers, and written so that others read them.

The independent reader and writer is the webdataset library.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

from tests.conftest import TINY, write_pairs
from tests.data.everything import write_everything
from train_clip.cli import main
from train_clip.data import crops
from train_clip.data.folder import scan_folder
from train_clip.data.scan import scan_source
from train_clip.data_tools.check import data_check
from train_clip.data_tools.report import CheckOptions
from train_clip.errors import BadSample, MissingFile, UsageError, UserError
from train_clip.options import SourceOptions
from train_clip.shards import members
from train_clip.shards.write import ShardOptions, data_shards, verify

PAIRS, IN_SHARD = 12, 5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """No test knows of another's shards."""
    members.index_of.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(pair_folder, tmp_path) -> Path:
    """The shards of twelve pairs: 5, 5 and 2."""
    data_shards(pair_folder, options=ShardOptions(output=tmp_path / "out", pairs_per_shard=IN_SHARD, num_workers=0))
    return tmp_path / "out"


def tar(path: Path, files: dict[str, bytes], **how: object) -> Path:
    """A tar of files."""
    with tarfile.open(path, "w") as written:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in how.items():
                setattr(member, key, value)
            written.addfile(member, io.BytesIO(content))
    return path


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (level, 2 * level, 99)).save(stream, "PNG")
    return stream.getvalue()


def scan(spec: Path | str):
    return scan_source(None, SourceOptions(shards=str(spec)))


def test_webdataset_reads_what_is_written(shards, pair_folder):
    """Keys, bytes of images and captions, in order, by the webdataset library; and its list of shards."""
    paths = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    folder = sorted(pair_folder.glob("*.png"))
    assert [one["__key__"] for one in samples] == [file.stem for file in folder]
    assert [one["png"] for one in samples] == [file.read_bytes() for file in folder]
    captions = [file.with_suffix(".txt").read_text().rstrip("\n") for file in folder]
    assert [one["txt"].decode() for one in samples] == captions
    listed = json.loads((shards / "index.json").read_text())["shardlist"]
    assert [(one["url"], one["nsamples"]) for one in listed] == [("00000.tar", 5), ("00001.tar", 5), ("00002.tar", 2)]
    for one in listed:
        content = (shards / one["url"]).read_bytes()
        assert (one["filesize"], one["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_what_webdataset_writes_is_read(pair_folder, tmp_path):
    """Pixels and captions of tars without an index, against the folder's."""
    with webdataset.ShardWriter(str(tmp_path / "%02d.tar"), maxcount=5, verbose=0) as writer:
        for file in sorted(pair_folder.glob("*.png")):
            caption = file.with_suffix(".txt").read_text()
            writer.write({"__key__": f"some/{file.stem}", "png": file.read_bytes(), "txt": caption, "json": "{}"})
    found = scan(tmp_path)
    assert not found.faults and found.others == {".json": 12} and len(found.pairs) == 12
    for own, other in zip(found.pairs, scan_folder(pair_folder).pairs, strict=True):
        assert own.captions() == other.captions()
        assert (crops.read_square(own.pixels, 16) == crops.read_square(other.pixels, 16)).all()
    assert found.pairs.names[0] == "00.tar!some/000.png"


SPECS = "out out/*.tar out/0000{0,1,2}.tar out/{00000..00002}.tar out/0000[01].tar::out/00002.tar@2".split()


@pytest.mark.parametrize("spec", SPECS)
def test_specs(spec, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = scan(spec)
    assert [pair.captions()[0] for pair in found.pairs] == [f"picture {number}" for number in range(12)]
    assert found.pairs.per_epoch == (14 if "@" in spec else 12)


def test_names_do_not_depend_on_where_the_shards_lie(shards, tmp_path):
    before = list(scan(shards).pairs.names)
    assert list(scan(shards.rename(tmp_path / "moved")).pairs.names) == before


def test_writing_again_writes_only_what_has_changed(shards, pair_folder):
    """By inodes and bytes: a shard that is there stays; one that is gone has the same bytes again."""
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in shards.iterdir()}
    (shards / "00001.tar").unlink()
    (pair_folder / "011.txt").write_text("another one\n")
    data_shards(pair_folder, options=ShardOptions(output=shards, pairs_per_shard=IN_SHARD, num_workers=0))
    after = {file.name: (file.stat().st_ino, file.read_bytes()) for file in shards.iterdir()}
    assert after["00000.tar"] == before["00000.tar"]
    assert after["00001.tar"][1] == before["00001.tar"][1]
    assert after["00002.tar"][1] != before["00002.tar"][1]
    members.index_of.cache_clear()
    assert scan(shards).pairs[11].captions() == ["another one"]


def test_a_killed_command_leaves_whole_shards_and_goes_on(pair_folder, tmp_path, monkeypatch):
    """Killed while the second is written: the first is whole, nothing half is left, and the rest follows."""
    options, calls = ShardOptions(output=tmp_path / "out", pairs_per_shard=IN_SHARD, num_workers=0), []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return headers(*arguments)

    headers = members.read_headers
    monkeypatch.setattr("train_clip.shards.write.read_headers", stop)
    with pytest.raises(KeyboardInterrupt):
        data_shards(pair_folder, options=options)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.tar", "00000.tar.json"]
    data_shards(pair_folder, options=options)
    assert len(calls) == 4 and len(scan(tmp_path / "out").pairs) == 12


def test_pairs_that_cannot_be_read_are_left_out_and_named(pair_folder, tmp_path, capsys):
    """Also when the shard is there already."""
    (pair_folder / "003.txt").write_bytes(b"\xff\xfe\0")
    for _ in range(2):
        data_shards(pair_folder, options=ShardOptions(output=tmp_path / "out", num_workers=0))
        said = capsys.readouterr().out
        assert "11 pairs in 1 shards" in said and "003.txt: caption is UTF-16" in said


# What is wrong


def test_a_truncated_shard_is_told_by_its_index_and_by_its_headers(shards):
    for file in (shards / "00000.tar", shards / "00001.tar"):
        file.write_bytes(file.read_bytes()[:4000])
    (shards / "00001.tar.json").unlink()
    with pytest.raises(UserError) as told:
        scan(shards).require_pairs()
    first, second = str(told.value).split("\n")
    assert "00000.tar: has 4,000 bytes; its index says" in first and "00001.tar: is" in second


@pytest.mark.parametrize("length", [512, 1500, 2048, 3000, 3500, 4096, 9000])
def test_every_truncation_of_a_foreign_shard_is_told(length, tmp_path):
    """Cut within headers, within data, and on their edges, where tarfile itself sees the end."""
    file = tar(tmp_path / "a.tar", {"a.png": png(1), "a.txt": b"one", "b.png": png(2), "b.txt": b"two"})
    assert len(scan(file).pairs) == 2
    file.write_bytes(file.read_bytes()[:length])
    members.index_of.cache_clear()
    if length == 9000:  # only of the zeros behind the end
        assert len(scan(file).pairs) == 2
    else:
        assert "a.tar: is" in scan(file).faults[0]


def test_a_shard_that_vanished_is_missed(shards):
    (shards / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar: there is no such shard"):
        scan(shards).require_pairs()


def test_a_shard_that_vanishes_or_shrinks_later_is_no_bad_sample(shards):
    pairs = scan(shards).pairs
    (shards / "00000.tar").unlink()
    with pytest.raises(MissingFile, match=r"00000\.tar"):
        crops.read_square(pairs[0].pixels, 16)
    (shards / "00001.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"00001\.tar: ends before"):
        pairs[5].captions()
    with pytest.raises(BadSample, match="not in its shard"):
        crops.read_square(f"{shards}/00002.tar!other.png", 16)


def test_names_that_are_not_clear(tmp_path):
    file = tar(tmp_path / "a.tar", dict.fromkeys("a.b.png a.b.txt c.png c.jpg c.txt d.png e.txt".split(), b"x"))
    found = scan(file)
    assert len(found.faults) == 2 and "a.b.png" in found.faults[0] and "c.jpg, c.png" in found.faults[1]
    assert (found.lone_images, found.lone_captions) == ([f"{file}!d.png"], [f"{file}!e.txt"])


def test_a_name_that_occurs_twice(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as written:
        for name in ("a.png", "a.txt", "a.png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            written.addfile(member, io.BytesIO(b"abc"))
    for _ in range(2):  # by the headers, and by the cache
        assert "a.tar!a.png: occurs more than once" in scan(tmp_path / "a.tar").faults[0]
        members.index_of.cache_clear()


def test_one_of_everything(tmp_path):
    """What is bad and what is mended in a tar is what is so in the folder, as `data check` counts it."""
    everything = write_everything(tmp_path / "folder")
    files = sorted(file for file in everything.folder.rglob("*") if file.is_file() and "dots." not in file.name)
    tar(tmp_path / "a.tar", {str(file.relative_to(everything.folder)): file.read_bytes() for file in files})
    for file in everything.folder.glob("dots.*"):
        file.unlink()
    how = {"max_bad": 1.0, "num_workers": 0, "image_size": 16}
    ours = data_check(options=CheckOptions(shards=str(tmp_path / "a.tar"), **how))
    theirs = data_check(everything.folder, options=CheckOptions(**how))
    there = {f"{everything.folder}/": f"{tmp_path}/a.tar!"}
    for old, new in there.items():
        assert ours["bad"] == {why: [path.replace(old, new) for path in paths] for why, paths in theirs["bad"].items()}
    for name in ("pairs", "bad_pairs", "captions", "sizes", "others"):
        shown = json.dumps(ours[name]).replace("a.tar!", "")
        assert shown == json.dumps(theirs[name]), name
    assert {what: found["number"] for what, found in ours["mended"].items()} == {
        what: found["number"] for what, found in theirs["mended"].items()
    }


def test_links_pickles_and_paths_out_of_the_folder_are_only_names(tmp_path):
    """Nothing is extracted or unpickled; links are passed over."""
    files = {"../../a.png": png(1), "../../a.txt": b"one", "/etc/b.png": png(2), "/etc/b.txt": b"two"}
    tar(tmp_path / "a.tar", files | {"a.pyd": b"cos\nsystem\n(S'touch /tmp/x'\ntR."})
    with tarfile.open(tmp_path / "a.tar", "a") as written:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            written.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    found = scan(tmp_path / "a.tar").require_pairs()
    assert sorted(pair.captions()[0] for pair in found.pairs) == ["one", "two"] and found.others == {".pyd": 1}
    assert [one for one in sorted(tmp_path.rglob("*")) if "cache" not in one.parts] == before


@pytest.mark.parametrize(
    ("spec", "error", "told"),
    [
        ("pipe:cat a.tar", UserError, "no command is run"),
        ("reference://x.tar", UserError, "is not read"),
        ("nothing.tar", UserError, "there is no such shard"),
        ("nowhere", MissingFile, "there are no such tars"),
        ("a.tar.gz", UserError, "is compressed"),
        ("a.tar@0", UsageError, "a number above 0"),
        ("a.tar@1.2.3", UsageError, "a number above 0"),
        ("{a,a}.tar", UsageError, "more than once"),
    ],
)
def test_specs_that_are_refused(spec, error, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=told):
        scan(spec).require_pairs()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"version": 1, "size": 5}', b"[" * 10**6])
def test_a_damaged_index_is_named(content, shards):
    (shards / "00000.tar.json").write_bytes(content)
    assert "00000.tar.json: is no index of a shard" in scan(shards).faults[0]


def test_an_index_of_places_beyond_the_end_is_refused(shards):
    file = shards / "00000.tar.json"
    told = json.loads(file.read_text())
    told["members"]["000.png"] = [512, 10**12]
    file.write_text(json.dumps(told))
    assert "beyond the end" in scan(shards).faults[0]


def test_a_flipped_byte_is_found_by_data_check(shards, capsys):
    content = bytearray((shards / "00001.tar").read_bytes())
    content[600] ^= 1
    (shards / "00001.tar").write_bytes(content)
    assert verify(scan(shards).pairs)[0].startswith(f"{shards}/00001.tar: its SHA-256")
    with pytest.raises(SystemExit):
        main(["data", "check", "--shards", str(shards), "--num_workers", "0"])
    assert "00001.tar: its SHA-256 is not that of its index" in capsys.readouterr().out


def test_commands_take_shards(shards, tmp_path, pair_folder):
    """What `train` and `evaluate` say of shards is what they say of the folder; `embed` gives the same embeddings."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    how = f"train --model_name {tmp_path}/tiny.yaml --batch_size 4 --epochs 1 --accelerator cpu --val_share 0.3"
    scores = {}
    for name, words in {"shards": ["--shards", str(shards)], "folder": ["--folder", str(pair_folder)]}.items():
        run = tmp_path / name
        main([*how.split(), "--shuffle", "false", "--output", str(run), *words])
        main(["evaluate", f"{run}/checkpoints/last.ckpt", *words, "--json", f"{run}.json"])
        scores[name] = json.loads(Path(f"{run}.json").read_text())["retrieval"]
    assert scores["shards"].keys() == scores["folder"].keys()
    main(["embed", str(tmp_path / "folder"), "--shards", str(shards), "--output", str(tmp_path / "a.npz")])
    main(["embed", str(tmp_path / "folder"), "--folder", str(pair_folder), "--output", str(tmp_path / "b.npz")])
    one, other = (np.load(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert (one["embeddings"] == other["embeddings"]).all() and one["path"].tolist()[0].endswith("00000.tar!000.png")


def test_written_from_a_table_with_names_that_collide(tmp_path):
    write_pairs(tmp_path / "x", 3)
    Image.new("RGB", (20, 20)).save(tmp_path / "x" / "000.jpg")
    rows = ["image,caption", "000.png,one", "000.jpg,two", "../x/001.png,three"]
    (tmp_path / "x" / "t.csv").write_text("\n".join(rows))
    data_shards(options=ShardOptions(pairs=tmp_path / "x" / "t.csv", output=tmp_path / "out", num_workers=0))
    found = scan(tmp_path / "out").require_pairs()
    assert sorted(pair.captions()[0] for pair in found.pairs) == ["one", "three", "two"]


def test_names_that_collide_again_once_they_are_changed(tmp_path):
    """a.b.png and a_b.png are one key, and what the third would be called is there already."""
    write_pairs(tmp_path / "x", 1)
    names = ["a_b-2.png", "a.b.png", "a_b.png"]
    for name in names:
        (tmp_path / "x" / name).write_bytes(png(len(name)))
    rows = ["image,caption", *(f"{name},{name}" for name in names)]
    (tmp_path / "x" / "t.csv").write_text("\n".join(rows))
    data_shards(options=ShardOptions(pairs=tmp_path / "x" / "t.csv", output=tmp_path / "out", num_workers=0))
    found = scan(tmp_path / "out").require_pairs()
    assert sorted(pair.captions()[0] for pair in found.pairs) == sorted(names)


def test_a_server_that_knows_no_ranges_is_named(shards, monkeypatch):
    pairs = scan(shards).pairs
    monkeypatch.setattr(members, "read_bytes", lambda shard, *_: Path(shard).read_bytes())
    with pytest.raises(UserError, match="its server sends the whole file"):
        pairs[0].captions()
