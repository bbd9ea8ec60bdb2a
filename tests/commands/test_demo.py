"""``train-clip demo``: the whole of it, on fewer epochs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train_clip import cli
from train_clip.commands import demo as demo_module
from train_clip.commands.demo import Scene, is_unseen, scenes, things


def test_the_demo_runs_through(tmp_path, monkeypatch, capsys, drawn):
    """One epoch instead of twenty: pictures, run, scores and the picture are there, and the way on is told."""

    def short(*groups):
        # On a machine with several devices each further process would run the verb itself.
        *options, run, trainer = groups
        assert trainer["devices"] == 1
        return train(*options, replace(run, epochs=1), trainer)

    train = demo_module.train
    monkeypatch.setattr(demo_module, "train", short)
    monkeypatch.setattr(demo_module, "COPIES", 1)
    monkeypatch.chdir(tmp_path)
    cli.main(["demo"])
    printed = capsys.readouterr().out
    scores = json.loads(Path("demo/scores.json").read_text())
    assert scores["num_images"] == 216
    assert scores["zero_shot"]["num_classes"] == 48
    among_all, among_unseen = scores["zero_shot"], scores["zero_shot_among_unseen"]
    assert (among_unseen["num_classes"], among_unseen["num_images"], among_unseen["chance"]) == (12, 216, 1 / 12)
    assert among_unseen["top1"] >= among_all["top1"]  # whatever is right among all is so among fewer
    assert f"Among all 48 combinations, {among_all['top1']:.1%} of the answers are right" in printed
    assert f"Among the 12 that it never saw, {among_unseen['top1']:.1%} are right (chance 8.3%)" in printed
    assert 0 < scores["retrieval"]["chance_text_to_image"]["1"] < 0.01
    assert Path("demo/best_captions.png").stat().st_size > 10_000
    assert "--folder data_dir" in printed
    with pytest.raises(SystemExit, match="demo: already exists"):
        cli.main(["demo"])


def test_unseen_combinations_are_made_of_seen_parts():
    """Each colour and each shape is trained on, though not together: a quarter of the combinations is kept out."""
    unseen = {scene.thing for scene in scenes() if is_unseen(scene)}
    seen = set(things()) - unseen
    assert len(unseen) * 4 == len(things())
    assert {thing.split()[0] for thing in seen} == {thing.split()[0] for thing in things()}
    assert {thing.split()[1] for thing in seen} == {thing.split()[1] for thing in things()}
    assert Scene("red", "circle", "small", "on the left").captions()[0] == "a small red circle on the left"
