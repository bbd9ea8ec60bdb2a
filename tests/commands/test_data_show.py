"""`data show`: the page against the pixels, lines and tokens that training would use."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_pairs
from train_clip.data.tokenizer import Tokenizer
from train_clip.data_tools.show import ShowOptions, data_show
from train_clip.errors import UserError


class Page(HTMLParser):
    """What a browser would find: pictures, and text by the class that it stands in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[np.ndarray] = []
        self.tokens: list[tuple[str, bool]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text.split("<section>", 1)[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            content = base64.b64decode((values["src"] or "").removeprefix("data:image/png;base64,"))
            self.pictures.append(np.asarray(Image.open(io.BytesIO(content))))
        elif tag != "br":
            self.open.append(values.get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1].startswith("token"):
            self.tokens.append((data, "cut" in self.open[-1]))


def page(folder: Path, **options: object) -> Page:
    file = data_show(folder, options=ShowOptions(output=folder.parent / "page.html", **options))  # type: ignore[arg-type]
    text = file.read_text("utf-8")
    file.unlink()
    return Page(text)


def test_a_page_is_not_overwritten(tmp_path: Path) -> None:
    """What is there stays, whatever it is."""
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match=r"page\.html: already exists, and is not overwritten"):
        page(write_pairs(tmp_path / "pairs", 2))
    assert (tmp_path / "page.html").read_text() == "mine"


def test_crops_lines_and_tokens(tmp_path: Path) -> None:
    """One pair: three crops, each out of the picture; both lines; the tokenizer's tokens, those that are cut marked."""
    folder = write_pairs(tmp_path / "pairs", 1, size=16)
    wide = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    Image.fromarray(wide).save(folder / "000.png")
    (folder / "000.txt").write_text("a <b>red</b> & blue ball\nshort\n", encoding="utf-8")
    seen = page(folder, crops=3, image_size=16, context_length=6)
    assert [picture.shape for picture in seen.pictures] == [(16, 16, 3)] * 3
    windows = [wide[:, left : left + 16].tobytes() for left in range(25)]
    assert all(picture.tobytes() in windows for picture in seen.pictures)
    assert len({picture.tobytes() for picture in seen.pictures}) > 1
    for line in ("a <b>red</b> & blue ball", "short"):
        assert line in seen.text
    tokenizer = Tokenizer()
    ids = [tokenizer.encode([line])[0] for line in ("a <b>red</b> & blue ball", "short")]
    expected = [(tokenizer.decode([one]), place >= 4) for row in ids for place, one in enumerate(row)]
    assert seen.tokens == expected
    assert f"({len(ids[0])} tokens, {len(ids[0]) - 4} cut)" in seen.text
    assert f"({len(ids[1])} tokens)" in seen.text


def test_a_pair_that_cannot_be_used_is_shown_with_the_reason(tmp_path: Path) -> None:
    """A truncated image beside its captions, and a caption file of blanks: the reasons are on the page."""
    folder = write_pairs(tmp_path / "pairs", 3)
    (folder / "000.png").write_bytes((folder / "000.png").read_bytes()[:60])
    (folder / "001.txt").write_text("\n")
    seen = page(folder, crops=1, image_size=8)
    assert len(seen.pictures) == 1
    assert f"{folder}/000.png: damaged image" in seen.text
    assert "picture 0" in seen.text
    assert f"{folder}/001.txt: caption is empty" in seen.text


def test_the_choice_depends_on_the_seed(tmp_path: Path) -> None:
    """Five of thirty, twice with a seed and once with another: the same page, another page; no pair twice."""
    folder = write_pairs(tmp_path / "pairs", 30)
    names = [
        re.findall(r"\d{3}\.png", page(folder, number=5, crops=1, image_size=8, seed=seed).text) for seed in (0, 0, 1)
    ]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == 5


def test_crops_are_augmented_as_in_training(tmp_path: Path) -> None:
    """A red dot at the left of each of 40 crops: some of them grey, some mirrored; without options all as they are."""
    folder = write_pairs(tmp_path / "pairs", 1, size=8)
    dot = np.zeros((8, 8, 3), dtype=np.uint8)
    dot[:4, :4, 0] = 200
    Image.fromarray(dot).save(folder / "000.png")
    plain = page(folder, crops=40, image_size=8).pictures
    assert all(np.array_equal(picture, dot) for picture in plain)
    seen = page(folder, crops=40, image_size=8, grayscale=0.5, horizontal_flip=0.5).pictures
    grey = [picture for picture in seen if (picture == picture[..., :1]).all()]
    mirrored = [picture for picture in seen if not picture[0, 0].any()]
    assert 8 < len(grey) < 32
    assert 8 < len(mirrored) < 32
    with pytest.raises(UserError, match="color_jitter is 9; expected from 0"):
        page(folder, color_jitter=9)


@pytest.mark.parametrize(
    "options",
    [{"number": 0}, {"crops": 0}, {"image_size": 0}, {"context_length": 1}, {"seed": -1}, {"resize_ratio": 0.0}],
)
def test_what_cannot_work(tmp_path: Path, options: dict[str, object]) -> None:
    """Numbers out of range: refused by name, no page."""
    with pytest.raises(UserError, match=f"{next(iter(options))} is "):
        page(write_pairs(tmp_path / "pairs", 2), **options)
    assert not (tmp_path / "page.html").exists()
