"""``--evaluate NAME=SOURCE``: the figures are those of ``evaluate``, and a run is the same with it as without."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import TINY, said, write_pairs
from train_clip import cli
from train_clip.commands.evaluate import EvaluateOptions, evaluate
from train_clip.scores.while_training import OF_VALIDATION, Evaluations, logged, possible_figures

RUN = (
    "train --folder pairs --model_name tiny.yaml --batch_size 4 --epochs 3 --val_share 0 --accelerator cpu "
    "--num_workers 0 --log_every_n_steps 1 --enable_progress_bar false"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pairs, nine others, and options of ``evaluate`` in a file."""
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("pairs"), 12)
    write_pairs(Path("more/cat"), 9)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    Path("classes.txt").write_text("cat\ndog\n")
    Path("zs.yaml").write_text("folder: more\nclasses: classes.txt\ntemplates: imagenet-7\n")
    return tmp_path


def rows(run: str) -> list[dict[str, str]]:
    with Path(run, "logs", "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def train(words: str, *further: str) -> None:
    cli.main([*RUN.split(), *words.split(), *further])


def test_the_figures_are_those_of_evaluate(here, capsys):
    """After each epoch, of two sources, in the log and on the screen; the last ones of last.ckpt by itself."""
    train("--output run --evaluate more=more --evaluate zs=zs.yaml")
    found = [row for row in rows("run") if "zs/top1" in row]
    assert [(row["step"], row["epoch"]) for row in found] == [("3", "1"), ("6", "2"), ("9", "3")]
    scores = evaluate(
        "run/checkpoints/last.ckpt", EvaluateOptions(Path("more"), Path("classes.txt"), Path("imagenet-7"))
    )
    expected = scores["retrieval"].figures() | scores["zero_shot"].figures()
    assert {f"zs/{logged(name)}": value for name, value in expected.items()} == pytest.approx(
        {name: float(value) for name, value in found[-1].items() if name.startswith("zs/")}
    )
    assert {name for name in found[-1] if name.startswith("more/")} == {
        f"more/{logged(name)}" for name in scores["retrieval"].figures()
    }
    assert "epoch 3, step 9, zs:  R@1 i→t" in capsys.readouterr().out


def test_a_run_is_the_same_with_it(here):
    """Weights and losses, bit for bit, with two loader processes of an evaluation in between and without."""
    Path("zs.yaml").write_text("folder: more\nnum_workers: 2\n")
    train("--output with --evaluate zs=zs.yaml --evaluate_every", "1 step")
    train("--output without")
    first, second = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("with", "without")
    )
    assert all(torch.equal(first[name], second[name]) for name in second)
    losses = [[row["train/loss"] for row in rows(run) if "train/loss" in row] for run in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 9


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--evaluate_every", "2"], [6, 9]),
        (["--evaluate_every", "2 steps"], [2, 4, 6, 8, 9]),
        (["--evaluate_every", "100 steps"], [9]),
        (["--evaluate_every", "100 steps", "--max_steps", "8"], [8]),
    ],
)
def test_when(here, words, steps):
    """Every so many epochs or steps, and at the end, within an epoch too."""
    train("--output run --evaluate more=more", *words)
    assert [int(row["step"]) for row in rows("run") if "more/R@1_image_to_text" in row] == steps


@pytest.mark.parametrize("every", ["1", "1 step"])
def test_the_best_is_best_by_the_figure_that_is_named(here, monkeypatch, every):
    """best.ckpt is of the step whose figure is the highest; here the second of all, whatever the others are."""
    marks = iter([0.2, 0.9, 0.4, *[0.3] * 9])
    score = Evaluations._score
    monkeypatch.setattr(Evaluations, "_score", lambda *given: score(*given) | {"zero-shot top-1": next(marks)})
    train("--output run --evaluate zs=zs.yaml --best_by zs/top1 --evaluate_every", every)
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == (6 if every == "1" else 2)
    assert evaluate("run", EvaluateOptions(Path("more")))["num_images"] == 9


def test_a_source_that_is_gone_does_not_end_the_run(here, monkeypatch, capsys):
    """Moved away after the first epoch, and back after the second: what is missing is said, and the run goes on."""
    score, moves = Evaluations._score, iter([("more", "more"), ("more", "away"), ("away", "more")])

    def moving(*given: object) -> object:
        Path.rename(*map(Path, next(moves)))
        return score(*given)

    monkeypatch.setattr(Evaluations, "_score", moving)
    train("--output run --evaluate more=more --best_by more/R@1_image_to_text")
    assert [row["step"] for row in rows("run") if "more/R@1_image_to_text" in row] == ["3", "9"]
    assert "--evaluate more: not scored at step 6. more: " in capsys.readouterr().out
    assert Path("run/checkpoints/best.ckpt").exists()


def test_a_resumed_run_knows_its_best_and_its_sources(here, monkeypatch, capsys):
    """The better figure of before is kept; by another figure nothing was best yet."""
    marks = iter([0.9, 0.1, 0.1, 0.2, 0.3, 0.3])
    score = Evaluations._score
    monkeypatch.setattr(Evaluations, "_score", lambda *given: score(*given) | {"zero-shot top-1": next(marks)})
    train("--output run --evaluate zs=zs.yaml --best_by zs/top1")
    for further, step in (([], 3), (["--best_by", "zs/R@1_image_to_text"], None)):
        epochs = str(4 + (step is None))
        cli.main(["train", "--resume", "run", "--epochs", epochs, "--enable_progress_bar", "false", *further])
        best = torch.load("run/checkpoints/best.ckpt", weights_only=True)["global_step"]
        assert best == (step or 15)
    assert "epoch 5, step 15, zs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["more"], "--evaluate more: expected NAME=SOURCE"),
        (["val=more"], "none of train, val, nor one that ends in _ema"),
        (["more_ema=more"], "none of train, val, nor one that ends in _ema"),
        (["a=more", "--evaluate", "a=more"], "each name once"),
        (["a=nowhere"], "nowhere"),
        (["a=pairs", "--evaluate_every", "sometimes"], "--evaluate_every sometimes: expected epochs"),
        (["a=odd.yaml"], "no options of `--evaluate a`"),
        (["a=classes.yaml"], "its class is 'cat' by its folder"),
        (["a=types.yaml"], "types.yaml: "),
        (["a=small.yaml"], "batch_size is 0; expected 1 or above"),
        (["a=templates.yaml"], "nowhere.txt: neither a file nor a set of templates"),
        (["a=one.yaml"], "one.txt: 1 class"),
        (["a=column.yaml"], "--class_column kind: is a column of a table"),
        (["a=single"], "single: 1 images, 1 of them with captions, and no classes: nothing to score"),
        (["a=more", "--best_by", "a/top1"], "--best_by a/top1: no figure of this run. Expected one of a/R@1_image"),
        (["a=zs.yaml", "--best_by", "a/top5"], "--best_by a/top5: no figure of this run"),
        (["a=more", "--best_by", "a/R@10_text_to_image"], "--best_by a/R@10_text_to_image: no figure of this run"),
        (["a=more", "--best_by", "b/top1"], "--best_by b/top1: no figure of this run"),
    ],
)
def test_what_is_wrong_is_refused(here, words, expected):
    """In a line, before anything is written."""
    Path("odd.yaml").write_text("folder: more\npicture: p.png\n")
    Path("classes.yaml").write_text("folder: more\nclasses: other.txt\n")
    Path("other.txt").write_text("fish\ndog\n")
    Path("types.yaml").write_text("folder: more\nbatch_size: many\n")
    Path("small.yaml").write_text("folder: more\nbatch_size: 0\n")
    Path("templates.yaml").write_text("folder: more\nclasses: classes.txt\ntemplates: nowhere.txt\n")
    Path("one.yaml").write_text("folder: more\nclasses: one.txt\n")
    Path("one.txt").write_text("cat\n")
    Path("column.yaml").write_text("folder: more\nclasses: classes.txt\nclass_column: kind\n")
    write_pairs(Path("single"), 1)
    with pytest.raises(SystemExit) as stop:
        train("--output run --evaluate", *words)
    assert expected in said(stop)
    assert not Path("run/logs").exists()


@pytest.mark.parametrize(
    ("figure", "is_one"), [("val/mean_recal", False), ("a/top1", False), ("val/R@5_image_to_text", True)]
)
def test_a_wrong_figure_is_refused_without_an_evaluation_too(here, figure, is_one):
    """One of validation is taken, and best.ckpt goes by it; those are all that validation logs, but for chance."""
    words = f"--output run --val_share 0.4 --best_by {figure}"
    if is_one:
        train(words)
        assert Path("run/checkpoints/best.ckpt").exists()
        names = {name for row in rows("run") for name in row if name.startswith("val/") and "chance" not in name}
        assert names == {f"val/{logged(name)}" for name in OF_VALIDATION}
        return
    with pytest.raises(SystemExit) as stop:
        train(words)
    assert f"--best_by {figure}: no figure of this run. Expected one of val/loss" in said(stop)
    assert not Path("run/logs").exists()


def test_one_of_validation_is_refused_where_nothing_is_held_out(here):
    """It would never come; with other data too."""
    with pytest.raises(SystemExit) as stop:
        train("--output run --evaluate more=more --best_by val/loss")
    assert "--best_by val/loss: is of held-out pairs; found none" in said(stop)
    assert not Path("run/logs").exists()


def test_a_best_that_goes_by_other_data_needs_no_validation(here, capsys):
    """The run ends before its first one, and best.ckpt is there: nothing else is said."""
    train("--output run --val_share 0.4 --max_steps 1 --evaluate zs=zs.yaml --best_by zs/top1 --batch_size 2")
    assert Path("run/checkpoints/best.ckpt").exists()
    assert "was not updated" not in capsys.readouterr().out


def test_the_figures_that_are_foretold_are_those_that_come(here):
    """Of captions, classes and lists of classes: the names that ``--best_by`` takes are those in the log."""
    Path("more/cat/001.cls").write_text("cat\ndog\n")
    Path("six.txt").write_text("cat\nhorse\nemu\ncow\nox\nowl\n")
    write_pairs(Path("six/cat"), 12)
    Path("six.yaml").write_text("folder: six\nclasses: six.txt\n")
    train("--output run --epochs 1 --evaluate more=more --evaluate zs=zs.yaml --evaluate six=six.yaml")
    sources = {"more": "more", "zs": "zs.yaml", "six": "six.yaml"}
    names = {
        f"{name}/{logged(figure)}"
        for name, options in Evaluations(sources).sources.items()
        for figure in possible_figures(options)
    }
    assert {"zs/mAP", "six/top5", "six/R@10_text_to_image"} <= names
    assert {name for row in rows("run") for name in row if name.partition("/")[0] in sources} == names


def test_classes_that_are_one_to_the_model_stop_the_run_before_its_first_step(here):
    """Their tokens are known when the model is."""
    Path("classes.txt").write_text("cat\nA & B\nA &amp; B\n")
    with pytest.raises(SystemExit) as stop:
        train("--output run --evaluate zs=zs.yaml")
    assert "have the same tokens" in said(stop)
    assert not list(Path("run").glob("checkpoints/*"))
