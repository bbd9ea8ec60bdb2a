"""Generated pictures: what they show, against what their captions say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from train_clip.commands import demo as synthetic
from train_clip.commands.demo import COLOURS, PLACES, SHAPES, SIDE, SIZES, Scene, draw, is_unseen, scenes, things
from train_clip.data.folder import scan_folder
from train_clip.data.pairs import read_caption_lines


def test_scenes_are_all_and_each_once() -> None:
    """8 colours · 6 shapes · 2 sizes · 9 places, no two with the same words."""
    every = list(scenes())
    assert len(every) == len(set(every)) == 8 * 6 * 2 * 9
    assert {scene.thing for scene in every} == set(things())
    captions = [tuple(scene.captions()) for scene in every]
    assert len(set(captions)) == len(captions)
    for scene in every:
        assert all(scene.thing in caption and scene.size in caption for caption in scene.captions())
        assert all(scene.place in caption for caption in scene.captions())


def test_a_quarter_of_the_things_is_unseen() -> None:
    """Two colours of each shape; every colour, shape, size and place is still met in training."""
    unseen = {scene.thing for scene in scenes() if is_unseen(scene)}
    assert len(unseen) == len(things()) / 4
    assert all(sum(thing.endswith(shape) for thing in unseen) == 2 for shape in SHAPES)
    seen = [scene for scene in scenes() if not is_unseen(scene)]
    assert not unseen & {scene.thing for scene in seen}
    assert {scene.colour for scene in seen} == set(COLOURS)
    assert {scene.shape for scene in seen} == set(SHAPES)
    assert {(scene.size, scene.place) for scene in seen} == {(size, place) for size in SIZES for place in PLACES}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_a_picture_shows_its_caption(shape: str, place: str) -> None:
    """Pixels nearer to the named colour than to the light ground: their middle is at the place, large covers more."""
    covered = {}
    for size in SIZES:
        pixels = np.asarray(draw(Scene("blue", shape, size, place), np.random.default_rng(0))).astype(float)
        assert pixels.shape == (SIDE, SIDE, 3)
        ground = pixels[0, 0]
        assert ground.min() >= 200
        mask = np.linalg.norm(pixels - ImageColor.getrgb(COLOURS["blue"]), axis=-1) < np.linalg.norm(
            pixels - ground, axis=-1
        )
        rows, columns = np.nonzero(mask)
        assert (columns.mean() / SIDE, rows.mean() / SIDE) == pytest.approx(PLACES[place], abs=0.08)
        covered[size] = mask.sum()
    assert covered["large"] > 2 * covered["small"] > 20


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the places: each picture has captions and class, two copies to train on, one unseen."""
    monkeypatch.setattr(synthetic, "PLACES", {"at the top": (0.5, 0.25), "on the left": (0.25, 0.5)})
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training, unseen = synthetic.write_synthetic(tmp_path / name, copies=2, seed=seed)
        contents.append({file.name: file.read_bytes() for file in sorted((tmp_path / name).rglob("*.png"))})
    assert contents[0] == contents[1]
    assert contents[0].keys() == contents[2].keys()
    assert contents[0] != contents[2]
    kept = [list(scan_folder(folder).pairs) for folder in (training, unseen)]
    assert [len(pairs) for pairs in kept] == [36 * 2 * 2 * 2, 12 * 2 * 2]
    for pair in kept[0] + kept[1]:
        thing = Path(pair.image).with_suffix(".cls").read_text(encoding="utf-8").strip()
        captions = read_caption_lines(pair.caption)[0]
        assert len(captions) == len(set(captions)) == 3
        assert all(thing in caption for caption in captions)
        assert Path(pair.image).name.startswith(thing.replace(" ", "-"))
    assert len(contents[0]) == len(kept[0]) + len(kept[1])
