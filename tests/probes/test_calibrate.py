"""Thresholds and probabilities of similarities against loops, scikit-learn, and data whose truth is known."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.calibration import _SigmoidCalibration

from tests.conftest import said, write_pairs
from tests.probes.pictures import COLOURS, draw_classes, save_model
from train_clip import cli, load
from train_clip.checkpoints.found import fingerprint
from train_clip.errors import UserError
from train_clip.losses import tiles
from train_clip.probes import calibrate
from train_clip.probes.calibrate import Sides
from train_clip.probes.calibration import CLASSES, Calibration, find_calibration, place_of
from train_clip.scores.bootstrap import intervals, ratios


def made_up(number: int, seed: int, width: int = 24, noise: float = 1.0) -> Sides:
    """Captions at random, and of each two images that are it and noise: any further ones are from the same source."""
    rng = np.random.default_rng(seed)
    texts = rng.normal(size=(number // 2, width))
    images = texts.repeat(2, axis=0) + noise * rng.normal(size=(number, width)) * rng.uniform(0.2, 2, (number, 1))
    unit = (torch.nn.functional.normalize(torch.from_numpy(one)).float() for one in (images, texts))
    return Sides(*unit, torch.stack([torch.arange(number), torch.arange(number) // 2]))


def loops(both: Sides):
    """Every pair: image, similarity, whether it matches."""
    own = set(zip(*both.matches.tolist(), strict=True))
    for image, row in enumerate(both.images @ both.candidates.T):
        for candidate, similarity in enumerate(row.tolist()):
            yield image, similarity, (image, candidate) in own


@pytest.mark.parametrize(("at_once", "bias"), [(10**6, None), (70, None), (70, -9.0)])
def test_counts_are_those_of_loops(monkeypatch, at_once, bias):
    """Pairs above thresholds, the histogram, the curve of the model's own probability; in one block and in several."""
    monkeypatch.setattr(tiles, "TILE", at_once)
    both = made_up(20, seed=0)
    thresholds = np.array([-0.3, 0.1, 0.15, 0.7])
    expected = np.zeros((2, 20, 4))
    counts = np.zeros((2, calibrate.BINS))
    for image, similarity, right in loops(both):
        expected[0, image] += right * (similarity >= thresholds)
        expected[1, image] += similarity >= thresholds
        counts[int(right), math.floor((similarity + 1) / 2 * calibrate.BINS)] += 1
    np.testing.assert_array_equal(calibrate.above(both, thresholds), expected)
    np.testing.assert_array_equal(calibrate.histogram(both), counts)

    told = calibrate.check(both, Calibration(0.15, 0.9, 9.0, -3.0), scale=20.0, bias=bias)
    bins = [[[], []] for _ in range(15)], [[[], []] for _ in range(15)]
    logits = 20 * (both.images @ both.candidates.T).double().numpy()
    before = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).ravel()
    before = before if bias is None else 1 / (1 + np.exp(-bias - logits.ravel()))
    for place, (_, similarity, right) in enumerate(loops(both)):
        center = (math.floor((similarity + 1) / 2 * calibrate.BINS) + 0.5) / calibrate.BINS * 2 - 1
        for kind, probability in zip(bins, (before[place], 1 / (1 + math.exp(3 - 9 * center))), strict=True):
            kind[min(int(15 * probability), 14)][0].append(probability)
            kind[min(int(15 * probability), 14)][1].append(right)
    for name, kind in zip(("ece_before", "ece_after"), bins, strict=True):
        error = sum(len(p) * abs(np.mean(p) - np.mean(right)) for p, right in kind if p)
        assert told[name] == pytest.approx(error / before.size)
    assert told["precision"]["value"] == pytest.approx(expected[0, :, 2].sum() / expected[1, :, 2].sum())
    assert told["recall"]["value"] == pytest.approx(expected[0, :, 2].sum() / 20)


def test_platt_is_that_of_scikit_learn():
    """All pairs one by one through scikit-learn's own Platt scaling: the same probabilities but for the bins' width."""
    both = made_up(60, seed=1)
    _, similarities, right = zip(*loops(both), strict=True)
    theirs = _SigmoidCalibration().fit(np.array(similarities), np.array(right))
    ours = Calibration(None, 0.9, *calibrate.platt(calibrate.histogram(both)))
    at = np.linspace(-1, 1, 50)
    np.testing.assert_allclose(ours.probability(at), theirs.predict(at), atol=2e-3)


def test_intervals_resample_images():
    """A loop that draws images with repetition; and pairs of one image hang together: the interval is wider."""
    both = made_up(40, seed=2)
    hits, tries = calibrate.above(both, [0.5])
    rng, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        some = rng.integers(0, 40, 40)
        drawn.append(hits[some].sum() / tries[some].sum())
    ours = intervals({"precision": ratios(hits, tries)[:, 0]})["precision"]
    np.testing.assert_allclose(ours, np.quantile(drawn, [0.025, 0.975]), atol=0.015)
    once = torch.tensor([1.0, 0.0] * 10, dtype=torch.float64)[:, None]
    together = ratios(10 * once, torch.full_like(once, 10))
    torch.testing.assert_close(together, ratios(once, torch.ones_like(once)))


def test_the_promise_is_kept_on_further_data():
    """60 fits, each checked on 4,000 fresh images of the same source: in 95% of them the precision is as promised."""
    fresh, kept, recalls = [made_up(200, seed=1000 + seed) for seed in range(20)], 0, []
    for seed in range(60):
        threshold = calibrate.fit(made_up(200, seed=seed), 0.8).threshold
        hits, tries = np.sum([calibrate.above(some, [threshold]).numpy() for some in fresh], axis=(0, 2, 3))
        kept += hits / tries >= 0.8
        recalls.append(hits / (20 * 200))
    assert kept >= 55, kept
    assert np.mean(recalls) > 0.3, "a threshold that lets nothing through promises nothing"


def test_probabilities_are_calibrated_on_further_data():
    """Fresh pairs in ten groups by probability: as many match as are said to, where the model's softmax is off."""
    calibration = calibrate.fit(made_up(600, seed=5), 0.9)
    told = calibrate.check(made_up(600, seed=6), calibration, scale=100.0)
    assert told["ece_after"] < 0.001 < told["ece_before"]


def test_what_cannot_be_kept_is_not_promised():
    """Similarities that say nothing, and too few images: no threshold, and nothing is called unfit."""
    blind = made_up(200, seed=3, noise=1e6)
    few = made_up(20, seed=4, noise=0.01)
    for both in (blind, few):
        found = calibrate.fit(both, 0.95)
        assert found.threshold is None and found.fits([-1, 1]).all()
    assert calibrate.fit(made_up(200, seed=4, noise=0.01), 0.95).threshold is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    save_model(folder / "model.ckpt"), draw_classes(folder / "data")
    (folder / "classes.txt").write_text("\n".join(COLOURS))
    return folder


def run(place: Path, *words: object) -> None:
    cli.main(["evaluate", str(place / "model.ckpt"), *map(str, words), "--calibrate"])


def test_the_command_writes_what_is_read_beside_the_checkpoint(place, tmp_path, capsys):
    """On classes: printed with the scores, known by the model's fingerprint, refused for another model."""
    words = ["--folder", place / "data", "--classes", place / "classes.txt", "--json", tmp_path / "scores.json"]
    run(place, *words, "--min_precision", "0.3")
    printed = capsys.readouterr().out
    assert "zero-shot over 3 classes" in printed and "zero_shot" in (tmp_path / "scores.json").read_text()
    assert "calibrated on 30 images and 3 classes, checked on 30 others" in printed
    path, model = place / "model.calibration.classes.json", load(place / "model.ckpt").model
    assert path == place_of(str(place / "model.ckpt"), CLASSES)
    written = json.loads(path.read_text())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["calibration"].items() <= written.items() and f"Calibration: {path}, where" in printed
    assert written["fingerprint"] == fingerprint(model) and written["calibration"]["precision"] == 0.3
    assert written["kind"] == "classes"
    assert find_calibration(model, str(place / "model.ckpt"), CLASSES) == Calibration(**written["calibration"])
    assert (written["calibration"]["threshold"] is None) == ("no threshold surely keeps" in printed)
    assert find_calibration(model, str(tmp_path / "other.ckpt"), CLASSES) is None
    with pytest.raises(UserError, match="of another model"):
        find_calibration(load(save_model(tmp_path / "other.ckpt", seed=1)).model, "", CLASSES, path)
    run(place, *words)
    assert json.loads(path.read_text())["calibration"]["precision"] == 0.95


def test_captions_that_images_share_are_one_candidate(place, tmp_path):
    """Twelve pairs with two captions each, one of them everywhere: 13 candidates, each match once; halves of six."""
    folder = write_pairs(tmp_path / "pairs", 12)
    for index in range(12):
        (folder / f"{index:03}.txt").write_text(f"number {index}\nThe  same\n{'the same'}\n")
    run(place, "--folder", folder)
    written = json.loads((place / "model.calibration.captions.json").read_text())
    assert (written["candidates"], written["images"]) == ("7 captions", [6, 6])
    pairs = sum(row[0] for row in written["check"]["curve"]), sum(row[2] for row in written["check"]["curve"])
    assert pairs == (6 * 7, 12)


def test_images_of_several_classes_match_each_of_them(place, tmp_path):
    """Eight images, each of the first class and of one of the other two: 16 pairs match, of 24."""
    folder = draw_classes(tmp_path / "data", number=4)
    files = sorted(folder.rglob("*.png"))[:8]
    for path in set(folder.rglob("*.png")) - {*files}:
        path.unlink()
    for row, path in enumerate(files):
        path.with_suffix(".cls").write_text(f"0\n{1 + row % 2}\n")
    run(place, "--folder", folder, "--classes", place / "classes.txt")
    written = json.loads((place / "model.calibration.classes.json").read_text())
    curve = np.array(written["check"]["curve"])
    assert written["images"] == [4, 4] and curve[:, 0].sum() == 12 and curve[:, 2].sum() == 8


def test_too_few_images_are_refused_after_the_scores(place, tmp_path, capsys):
    """One pair leaves a half without any; the scores are there all the same. Other wrong commands are refused, too."""
    folder = write_pairs(tmp_path / "pairs", 1)
    with pytest.raises(SystemExit) as stop:
        run(place, "--folder", folder, "--json", tmp_path / "scores.json")
    assert "1 images with a caption or class. Expected some for each half" in said(stop)
    assert (tmp_path / "scores.json").exists() and "1 images, 2 captions" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run(place, "--folder", folder, "--min_precision", "1")
    assert "min_precision is 1.0; expected above 0 and below 1" in said(stop)
    with pytest.raises(SystemExit) as stop:
        run(place, folder, "--folder", folder)
    assert "--calibrate True: is for one model" in said(stop)


def test_what_it_needs_is_looked_for_before_anything_is_embedded(place, tmp_path, monkeypatch):
    """scikit-learn, and a place beside the weights."""
    monkeypatch.setattr("train_clip.evaluation.embed.embed_images", lambda *_: pytest.fail("embedded"))
    folder = write_pairs(tmp_path / "pairs", 4)
    save_model(tmp_path / "model.ckpt")
    (tmp_path / "model.calibration.captions.json").mkdir()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--folder", folder)
    assert "model.calibration.captions.json: is not a regular file" in said(stop)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(SystemExit) as stop:
        run(place, "--folder", folder)
    assert "--calibrate needs scikit-learn" in said(stop)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 10**5, '{"version": 2}', "\udcff"])
def test_damaged_calibrations_are_refused(content, tmp_path):
    """By one line that names the file; so are numbers that are not finite or none."""
    path = tmp_path / "c.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match="or damaged"):
        find_calibration(None, "", CLASSES, path)
    for value in (math.nan, "x", [1]):
        values = {"threshold": 0.5, "precision": 0.9, "slope": value, "intercept": 0}
        path.write_text(json.dumps({"version": 1, "kind": "classes", "fingerprint": "", "calibration": values}))
        with pytest.raises(UserError, match="or damaged"):
            find_calibration(None, "", CLASSES, path)
    with pytest.raises(FileNotFoundError):
        find_calibration(None, "", CLASSES, tmp_path / "none.json")
