"""``train-clip search``: against products of what ``encode`` gives, and every way to ask and to show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import said, write_pairs
from tests.search.made import save_calibration, save_embeddings, save_model, save_pictures, unit_rows
from train_clip import cli, load
from train_clip.search import search as module
from train_clip.search.vectors import open_vectors

HOSTILE = '<img src=x onerror=alert(1)> \x1b[31m \u202e "quoted"\nline'
OUTSIDE = (
    "/etc/passwd",
    "../secret.png",
    "a/../../secret.png",
    "link.png",
    "loop.png",
    "fifo.png",
    "a\0b.png",
    "page.txt",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs, a model, and the pairs' embeddings by the command, of images and of captions."""
    folder = tmp_path_factory.mktemp("search")
    save_model(folder / "model.safetensors")
    write_pairs(folder / "pairs", 12)
    for what, name in (("images", "x.parquet"), ("captions", "captions.npz")):
        words = f"--folder {folder / 'pairs'} --what {what} --output {folder / name} --device cpu"
        cli.main(["embed", str(folder / "model.safetensors"), *words.split()])
    return folder


def run(*words: object) -> None:
    cli.main(["search", *map(str, words), "--device", "cpu"])


def expected(place: Path, query: str | Path, k: int, kind: str = "images") -> list[tuple[str, float]]:
    """The names and cosines of the k nearest, by ``encode`` and a sort."""
    model = load(place / "model.safetensors")
    images = sorted((place / "pairs").glob("*.png"))
    items = images if kind == "images" else [line for image in images for line in lines(image)]
    names = [image.name for image in images for _ in (lines(image) if kind == "captions" else "x")]
    products = model.encode(items).astype(np.float64) @ model.encode([query])[0].astype(np.float64)
    return [(names[row], float(products[row])) for row in sorted(range(len(items)), key=lambda row: -products[row])[:k]]


def lines(image: Path) -> list[str]:
    return image.with_suffix(".txt").read_text().split("\n")[:-1]


def require_results(found: list, expected: list[tuple[str, float]]) -> None:
    assert [hit["path"] for hit in found] == [name for name, _ in expected]
    np.testing.assert_allclose([hit["similarity"] for hit in found], [one for _, one in expected], atol=1e-5)


def test_texts_queries_and_an_image_are_found_as_encode_says(place, tmp_path, capsys) -> None:
    """Three kinds of queries in one command; the table shows what the JSON holds."""
    (tmp_path / "queries.txt").write_text("a green dot\n\n  the one numbered 3 \n")
    image = place / "pairs" / "004.png"
    run(place / "x.parquet", "a red hat", "-k", "5", "--image", image, "--queries", tmp_path / "queries.txt",
        "--json", tmp_path / "x.json")  # fmt: skip
    told = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    queries = {one["query"]: one["results"] for one in told["queries"]}
    assert list(queries) == ["a red hat", "a green dot", "the one numbered 3", str(image)]
    for query, found in queries.items():
        require_results(found, expected(place, image if query == str(image) else query, 5))
    assert queries[str(image)][0]["path"] == "004.png" and queries[str(image)][0]["caption"] == "picture 4"
    printed = capsys.readouterr().out
    assert "12 embeddings of 16 numbers, compared one by one" in printed
    table = re.findall(r"^  +(-?\d\.\d{3})  (\S+)  (.+)$", printed, re.MULTILINE)
    rows = [(f"{hit['similarity']:.3f}", hit["path"], hit["caption"]) for found in queries.values() for hit in found]
    assert table == rows


def test_captions_are_searched_too(place, tmp_path) -> None:
    run(place / "captions.npz", "picture 7", "--k", "3", "--json", tmp_path / "x.json")
    (one,) = json.loads((tmp_path / "x.json").read_text())["queries"]
    assert one["results"][0]["caption"] == "picture 7" and one["results"][0]["similarity"] > 0.999
    require_results(one["results"], expected(place, "picture 7", 3, "captions"))


def test_beyond_the_limit_by_an_index_that_is_tried_once(place, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(module, "EXACT", 10)
    for _ in range(2):
        run(place / "x.parquet", "a red hat", "-k", "4", "--json", tmp_path / "x.json")
        (one,) = json.loads((tmp_path / "x.json").read_text())["queries"]
        assert [hit["path"] for hit in one["results"]] == [name for name, _ in expected(place, "a red hat", 4)]
    assert len(re.findall(r"it finds 100\.0% \(12 queries\)", capsys.readouterr().out)) == 1
    run(place / "x.parquet", "a red hat", "--exact", "--json", tmp_path / "x.json")
    assert "compared one by one" in capsys.readouterr().out


def test_another_model_is_refused_and_a_moved_one_given(place, tmp_path, monkeypatch) -> None:
    other, moved = save_model(tmp_path / "other.safetensors", seed=1), save_model(tmp_path / "moved.safetensors")
    run(place / "x.parquet", "a red hat", "--checkpoint", moved)
    with pytest.raises(SystemExit) as stop:
        run(place / "x.parquet", "a red hat", "--checkpoint", other)
    found = r"other.safetensors: another model \(fingerprint \w{12}\) than made .*x.parquet \(\w{12}, tiny, once at"
    assert re.search(found, said(stop))
    rows = save_embeddings(tmp_path / "y.npy", moved, unit_rows(2), "ab", "cd", tmp_path)
    moved.unlink()
    with pytest.raises(SystemExit) as stop:
        run(rows, "a red hat")
    assert re.search(r"moved.safetensors: .*\n.*y.npy was made with it. If it has moved, give --checkpoint", said(stop))


def test_a_calibration_beside_the_checkpoint_gives_probabilities(place, tmp_path, capsys) -> None:
    """Of images with captions, whichever is looked for: in the table, JSON and pictures, by the logistic function."""
    model, image = save_model(tmp_path / "m.safetensors"), place / "pairs" / "004.png"
    save_calibration(tmp_path / "m.calibration.captions.json", model, 0.02)
    for name, calibrated in (("x.parquet", "a red hat"), ("captions.npz", str(image))):
        written = [tmp_path / f"{name}.json", tmp_path / f"{name}.html"]
        run(place / name, "a red hat", "--image", image, "--checkpoint", model, "-k", "12", "--json", written[0],
            "--html", written[1])  # fmt: skip
        for one in json.loads(written[0].read_text())["queries"]:
            similar, matches = ([hit[of] for hit in one["results"]] for of in ("similarity", "match"))
            if one["query"] != calibrated:
                assert matches == [None] * 12 and one["note"] == ""
                continue
            assert (one["note"] == "") == (max(similar) >= 0.02)
            np.testing.assert_allclose(matches, 1 / (1 + np.exp(0.08 - 8 * np.array(similar))))
            shown = [f"{share:.0%}" for share in matches]
            assert re.findall(r"</b> \((\d+%)\) ", written[1].read_text()) == shown
            assert re.findall(r"^  +-?\d\.\d{3}  +(\d+%)  \S", capsys.readouterr().out, re.MULTILINE) == shown


def test_nothing_fits_below_the_threshold(place, tmp_path, capsys) -> None:
    """It is said, and the most similar are shown all the same; of one query, not of another."""
    best = expected(place, "a red hat", 1)[0][1]
    other = expected(place, "a green dot", 1)[0][1]
    path = save_calibration(tmp_path / "c.json", place / "model.safetensors", (best + other) / 2)
    run(place / "x.parquet", "a red hat", "a green dot", "--calibration", path, "--json", tmp_path / "x.json",
        "--html", tmp_path / "x.html")  # fmt: skip
    notes = {one["query"]: one["note"] for one in json.loads((tmp_path / "x.json").read_text())["queries"]}
    lower, higher = sorted(notes, key=lambda query: {"a red hat": best, "a green dot": other}[query])
    assert notes == {lower: "nothing fits, with a precision of 90.0%", higher: ""}
    printed, page = capsys.readouterr().out, (tmp_path / "x.html").read_text()
    assert f"{lower}\n  nothing fits, with a precision of 90.0%\n" in printed and printed.count("nothing fits") == 1
    assert f"<h2>{lower}</h2>\n<p>nothing fits, with a precision of 90.0%</p>\n<ol>" in page
    assert page.count("nothing fits") == 1 and page.count("<li>") == 24
    save_calibration(path, save_model(tmp_path / "other.safetensors", seed=1), 0.1)
    with pytest.raises(SystemExit) as stop:
        run(place / "x.parquet", "a red hat", "--calibration", path)
    assert "c.json: of another model" in said(stop)
    save_calibration(path, place / "model.safetensors", 0.1, kind="classes")
    with pytest.raises(SystemExit) as stop:
        run(place / "x.parquet", "a red hat", "--calibration", path)
    assert "c.json: of similarities with classes; expected captions" in said(stop)


def test_a_calibration_from_before_more_training_is_left_out(place, tmp_path, capsys) -> None:
    """What lies beside the checkpoint, given by nobody, stops no search: it is said, and no probability is shown."""
    model = save_model(tmp_path / "m.safetensors")
    other = save_model(tmp_path / "other.safetensors", seed=1)
    save_calibration(tmp_path / "m.calibration.captions.json", other, 0.02)
    run(place / "x.parquet", "a red hat", "--checkpoint", model)
    printed = capsys.readouterr().out
    assert "m.calibration.captions.json: of another model" in printed and "%" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to look for"),
        (["a", "-k", "0"], "k is 0; expected from 1 to 1000"),
        (["a", "--k", "1001"], "k is 1001; expected from 1 to 1000"),
        (["--image", "nothing.png"], r"nothing.png: file does not exist\. Expected --image to be an image"),
        (["--image", "empty"], r"empty: empty file\. Expected --image"),
        (["--queries", "nothing.txt"], r"nothing.txt: caption cannot be read .*--queries a query per line"),
        (["--queries", "empty"], "empty: caption is empty.*--queries a query per line"),
        (["a", "--html", "empty"], "empty: already exists"),
        (["--page", "--port", "99999"], "--port 99999: cannot be used"),
        (["a", "--page"], "--page and queries"),
        (["--page", "--json", "x.json"], "--page writes no file, found x.json"),
        (["--page", "--html", "x.html"], "--page writes no file, found x.html"),
        (["a", "--json", "."], "is not a regular file"),
    ],
)
def test_what_cannot_be_asked(words, message, place, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    if "--json" in words:
        monkeypatch.setattr(module, "Searched", None)  # no model is loaded before
    with pytest.raises(SystemExit) as stop:
        run(place / "x.parquet", *words)
    assert re.search(message, said(stop))


@pytest.mark.parametrize("about", [{"weights": 3}, {"weights": {"image_size": "x"}}, {"checkpoint": None}])
def test_what_a_damaged_file_says_is_no_traceback(about, place, tmp_path) -> None:
    file = save_embeddings(tmp_path / "x.npz", place / "model.safetensors", unit_rows(2), "ab", "cd", tmp_path, **about)
    with pytest.raises(SystemExit) as stop:
        run(file, "a")
    assert isinstance(stop.value.code, str) and str(file) in said(stop)


def hostile(place: Path, folder: Path) -> Path:
    """Embeddings whose captions are markup, and whose paths lead out of the folder."""
    root = folder / "root"
    names = save_pictures(root, 2)
    save_pictures(folder / "else", 1)
    (folder / "else" / "000.png").rename(folder / "secret.png")
    (root / "link.png").symlink_to(folder / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "a.txt").write_text("text")
    (root / "inside.png").symlink_to(root / names[1])
    __import__("os").mkfifo(root / "fifo.png")
    paths = [*names, "inside.png", *OUTSIDE, str(folder / "secret.png")]
    captions = [HOSTILE] * len(paths)
    rows = np.repeat(unit_rows(1), len(paths), axis=0)
    return save_embeddings(folder / "x.npz", place / "model.safetensors", rows, paths, captions, root)


def test_what_hostile_embeddings_say_is_text_and_shows_no_other_file(place, tmp_path, capsys) -> None:
    """In the table, and in the page of pictures that can be passed on: three pictures, and no more."""
    file = hostile(place, tmp_path)
    run(file, "<script>alert(2)</script>", "--html", tmp_path / "x.html", "-k", "99")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and r"onerror=alert(1)> \x1b[31m" in printed
    written = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<img src=x" not in written and "alert(2)</script>" not in written
    assert "&lt;img src=x onerror=alert(1)&gt; \\x1b[31m \\u202e &quot;quoted&quot;\\nline" in written
    assert len(re.findall(r'src="data:image/jpeg;base64,[^"]', written)) == 3
    assert len(re.findall(r"<li>", written)) == len(open_vectors(file)) and "http:" not in written
    with pytest.raises(SystemExit) as stop:
        run(file, "a", "--html", tmp_path / "x.html")
    assert "already exists" in said(stop)


def test_pictures_of_a_folder_that_has_moved(place, tmp_path) -> None:
    names = save_pictures(tmp_path / "there", 3)
    file = save_embeddings(
        tmp_path / "x.npz", place / "model.safetensors", unit_rows(3), names, names, tmp_path / "gone"
    )
    for words, number in (([], 0), (["--folder", tmp_path / "there"], 3)):
        page = tmp_path / f"{number}.html"
        run(file, "a", "--html", page, *words)
        assert len(re.findall(r'base64,[^"]', page.read_text())) == number
