"""``evaluate`` on several models, subgroups, classes of a table, several classes an image, confusion matrices."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix

from tests.conftest import TINY, said
from tests.scores.test_bootstrap import bounds_of
from train_clip import CLIPWrapper, cli
from train_clip.commands.evaluate import EvaluateOptions, evaluate
from train_clip.errors import UserError
from train_clip.evaluation.zero_shot import TEMPLATES, ZeroShot, read_list
from train_clip.scores import bootstrap, comparison


def checkpoint(path: Path, seed: int) -> Path:
    """A model of random weights."""
    torch.manual_seed(seed)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=0, enable_progress_bar=False
    )
    trainer.strategy.connect(CLIPWrapper("tiny", TINY))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def here(pair_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pairs, two models, and a table of 24 captions with a class, a list of classes and where it was taken."""
    folder = pair_folder.parent
    monkeypatch.chdir(folder)
    for name, seed in (("a.ckpt", 0), ("b.ckpt", 1)):
        checkpoint(folder / name, seed)
    (folder / "classes.txt").write_text("cat\ndog\nred bus\n")
    with (folder / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "label", "place"])
        for place in range(12):
            for line in (f"picture {place}", f"the one numbered {place}"):
                rows.writerow(
                    [f"pairs/{place:03}.png", line, ["cat", "Dog", "2"][place % 3], ["sea", "town"][place // 8]]
                )
    lists = [["cat"], ["dog", "red bus"], [], ["cat", "dog"], ["red bus"]]
    with (folder / "t.jsonl").open("w") as file:
        for place in range(12):
            row = {"image": f"pairs/{place:03}.png", "caption": f"picture {place}", "labels": lists[place % 5]}
            file.write(json.dumps(row) + "\n")
    return folder


def embeddings(
    model: str, here: Path, templates: tuple[str, ...] = ("a photo of a {}.",)
) -> tuple[np.ndarray, np.ndarray]:
    """Images (12, D) and classes (3, D), by the wrapper's own methods and means in a loop."""
    module = CLIPWrapper.load_from_checkpoint(here / model)
    images = module.embed_images([here / f"pairs/{place:03}.png" for place in range(12)])
    means = [module.embed_texts([one.format(name) for one in templates]).mean(0) for name in ("cat", "dog", "red bus")]
    return images.numpy(), torch.stack([mean / mean.norm() for mean in means]).numpy()


def test_two_models_are_compared_on_the_same_images(here, capsys):
    """The difference of R@1, and its bounds from resamples that are of the same images for both: a loop, 1e-12."""
    cli.main("evaluate a.ckpt b.ckpt --folder pairs --json scores.json".split())
    printed = capsys.readouterr().out
    assert "b.ckpt less a.ckpt" in printed and printed.count("R@1 ") == 4
    found = json.loads((here / "scores.json").read_text())
    hits = {}
    for name in ("a.ckpt", "b.ckpt"):
        module = CLIPWrapper.load_from_checkpoint(here / name)
        images = module.embed_images([here / f"pairs/{place:03}.png" for place in range(12)])
        captions = [line for place in range(12) for line in (f"picture {place}", f"the one numbered {place}")]
        similarity = images @ module.embed_texts(captions).T
        hits[name] = (similarity.argmax(1) // 2 == torch.arange(12)).numpy().astype(float)
        assert found["models"][name]["retrieval"]["image_to_text"]["1"] == pytest.approx(hits[name].mean())
    generator, differences = np.random.default_rng(bootstrap.SEED), []
    for _ in range(bootstrap.RESAMPLES):
        drawn = generator.integers(12, size=12)
        differences.append(hits["b.ckpt"][drawn].mean() - hits["a.ckpt"][drawn].mean())
    of_b = found["differences"]["b.ckpt"]
    assert of_b["differences"]["R@1 i→t"] == pytest.approx(hits["b.ckpt"].mean() - hits["a.ckpt"].mean())
    assert of_b["intervals"]["R@1 i→t"] == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist(), abs=1e-12)


@pytest.mark.parametrize(("number", "is_sure"), [(2, False), (5, False), (6, True)])
def test_few_images_do_not_make_a_difference_sure(number, is_sure):
    """One model right on all images and the other on none: as the sign test, 2 · 0.5ⁿ below 0.05."""
    scores = {}
    for name, rank in (("a", 0), ("b", 1)):
        places, labels = torch.full((number,), rank), torch.zeros(number).long()
        scores[name] = comparison._replicates({"": ZeroShot(0, None, 0, 0.5, number, 2, places=places, labels=labels)})
    found = comparison._differences(("a", "b"), scores["a"], scores["b"])
    assert found.differences["zero-shot top-1"] == -1
    assert (found.rows()[1][-1] == "") == is_sure


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.ckpt a.ckpt --folder pairs", "given twice"),
        ("a.ckpt b.ckpt --pairs t.csv --by place", "is for one model; found 2"),
        ("a.ckpt b.ckpt --folder pairs --picture p.png", "is for one model; found 2"),
        ("a.ckpt --folder pairs --by place", "--by place: is a column of a table"),
        ("a.ckpt --folder pairs --classes classes.txt --class_column label", "--class_column label: is a column"),
        ("a.ckpt --pairs t.csv --class_column label", "--class_column label: is a column"),
        ("a.ckpt --folder pairs --confusion c.png", "needs the names of the classes"),
        ("a.ckpt --folder pairs --classes classes.txt --confusion c.xlsx", "a name that ends in .csv or .png"),
        ("a.ckpt --pairs t.csv --by colour", "expected one 'colour'. Name the columns with --image_column and --by;"),
        ("a.ckpt --pairs t.jsonl --classes classes.txt --class_column kind", "--image_column and --class_column;"),
        ("a.ckpt --pairs t.csv --classes classes.txt --class_column place", "its class is 'sea' by the column 'place'"),
        ("a.ckpt --pairs t.csv --classes classes.txt --class_column place", "to the list, or name another column."),
        ("a.ckpt --pairs t.jsonl --classes classes.txt --class_column labels --confusion c.csv", "several classes"),
    ],
)
def test_what_does_not_fit_is_refused(here, words, expected):
    """In a line that says what was found, and what to do."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *words.split()])
    assert expected in said(stop)


def test_images_without_a_class_are_refused_where_each_has_one(here):
    """An empty cell among cells of one class; among lists of several it is an image of none."""
    rows = [json.loads(line) for line in (here / "t.jsonl").read_text().splitlines()]
    for row in rows:
        row["labels"] = row["labels"][:1]
    (here / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvaluateOptions(pairs=here / "t.jsonl", classes=here / "classes.txt", class_column="labels")
    with pytest.raises(UserError, match=r"002\.png: has no class in the column 'labels'"):
        evaluate("a.ckpt", options)


def test_classes_of_a_table(here, capsys):
    """By name in any case, and by number; per class, and the matrix of scikit-learn, in JSON and as CSV and PNG."""
    words = "evaluate a.ckpt --pairs t.csv --classes classes.txt --class_column label --json scores.json --confusion"
    for target in ("c.csv", "c.png"):
        cli.main([*words.split(), target])
    images, classes = embeddings("a.ckpt", here)
    names, labels, taken = ["cat", "dog", "red bus"], np.arange(12) % 3, (images @ classes.T).argmax(1)
    matrix = confusion_matrix(labels, taken, labels=range(3))
    found = json.loads((here / "scores.json").read_text())["zero_shot"]
    assert found["top1"] == pytest.approx(np.mean(labels == taken))
    assert found["per_class"] == pytest.approx(dict(zip(names, matrix.diagonal() / 4, strict=True)))
    assert list(found["intervals"]) == ["zero-shot top-1", "zero-shot mean per class"]
    with (here / "c.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["class", *names], *([name, *map(str, row)] for name, row in zip(names, matrix.tolist(), strict=True))
        ]  # fmt: skip
    assert "zero-shot over 3 classes: top-1" in capsys.readouterr().out


def test_a_picture_of_the_confusion(here, drawn):
    """PNG, with names that hold dollar signs."""
    (here / "classes.txt").write_text("$cat_\n$dog^\nred bus\n")
    text = (here / "t.csv").read_text().replace("cat", "$cat_").replace("Dog", "$dog^")
    (here / "t.csv").write_text(text)
    words = "evaluate a.ckpt --pairs t.csv --classes classes.txt --class_column label --confusion c.png"
    cli.main(words.split())
    assert Image.open(here / "c.png").size[0] > 200


def test_values_of_json_that_are_not_text(here):
    """Numbers are classes, from 0, and truth values make subgroups."""
    rows = [
        {"image": f"pairs/{place:03}.png", "caption": f"picture {place}", "label": place % 3, "indoors": place < 4}
        for place in range(12)
    ]
    (here / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvaluateOptions(pairs=here / "t.jsonl", classes=here / "classes.txt", class_column="label", by="indoors")
    scores = evaluate("a.ckpt", options)
    assert scores["zero_shot"].labels.tolist() == [place % 3 for place in range(12)]
    assert scores["by"].num_images == {"False": 8, "True": 4}


@pytest.mark.parametrize("source", ["column", "files"])
def test_several_classes_an_image(here, source):
    """Lists in a table, and STEM.cls of several lines: average precision of each class as scikit-learn has it."""
    lists = [json.loads(line)["labels"] for line in (here / "t.jsonl").read_text().splitlines()]
    if source == "files":
        lists = [labels or ["cat"] for labels in lists]
        for place, labels in enumerate(lists):
            (here / f"pairs/{place:03}.cls").write_text("\n".join(labels))
        options = EvaluateOptions(here / "pairs", classes=here / "classes.txt")
    else:
        options = EvaluateOptions(pairs=here / "t.jsonl", classes=here / "classes.txt", class_column="labels")
    scores = evaluate("a.ckpt", options)
    images, classes = embeddings("a.ckpt", here)
    expected = {
        name: average_precision_score([name in labels for labels in lists], images @ classes[place])
        for place, name in enumerate(("cat", "dog", "red bus"))
    }
    assert scores["zero_shot"] is None
    assert scores["multi_label"].per_class == pytest.approx(expected, abs=1e-6)
    assert scores["multi_label"].mean == pytest.approx(np.mean(list(expected.values())), abs=1e-6)


def test_images_of_several_classes_that_cannot_be_read(here):
    """Among the others one has no class: still mAP, of the images that are left."""
    rows = [json.loads(line) for line in (here / "t.jsonl").read_text().splitlines()]
    for place, row in enumerate(rows):
        row["labels"] = [["cat", "dog"], [], ["red bus"], ["dog"]][min(place, 2 + place % 2)]
    (here / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "pairs/000.png").write_bytes(b"no image")
    options = EvaluateOptions(pairs=here / "t.jsonl", classes=here / "classes.txt", class_column="labels")
    scores = evaluate("a.ckpt", options)
    assert scores["num_images"] == 11 and scores["zero_shot"] is None
    assert set(scores["multi_label"].per_class) == {"dog", "red bus"}


def test_subgroups(here, capsys):
    """R@1 of the images of each place alone, searched among all captions; the interval from their images alone."""
    options = EvaluateOptions(pairs=here / "t.csv", by="place")
    scores = evaluate("a.ckpt", options)
    found = scores["by"]
    assert found.num_images == {"sea": 8, "town": 4}
    hits = (scores["retrieval"].queries[0].ranks <= 1).double().numpy()
    assert found.values["sea"]["R@1 i→t"] == pytest.approx(hits[:8].mean())
    assert found.values["town"]["R@1 i→t"] == pytest.approx(hits[8:].mean())
    generator = np.random.default_rng(bootstrap.SEED)
    means = [hits[8:][generator.integers(4, size=4)].mean() for _ in range(bootstrap.RESAMPLES)]
    assert found.intervals["town"]["R@1 i→t"] == pytest.approx(bounds_of(means, 4))
    assert "place" in capsys.readouterr().out


def test_subgroups_with_markup_and_images_of_no_value(here, capsys):
    """A value that looks like markup is printed as it is; an empty one has a name."""
    text = (here / "t.csv").read_text().replace("town", "[red]x").replace("sea", "")
    (here / "t.csv").write_text(text)
    cli.main("evaluate a.ckpt --pairs t.csv --by place".split())
    printed = capsys.readouterr().out
    assert "[red]x" in printed and "(none)" in printed


# Lines, first, last, and SHA-256 of the lines joined, each with LF: as data/prompts.md and, ImageNet's,
# notebooks/Prompt_Engineering_for_ImageNet.ipynb have them (github.com/openai/CLIP, compared line by line).
OF_CLIP = {
    "aircraft": (2, "a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft.", "5fb52ce57d2557"),
    "birds": (1, "a photo of a {}, a type of bird.", "a photo of a {}, a type of bird.", "8715eb382a4659"),
    "cifar": (18, "a photo of a {}.", "a photo of the big {}.", "7b155d8b94e262"),
    "flowers": (1, "a photo of a {}, a type of flower.", "a photo of a {}, a type of flower.", "1d8418345fa75d"),
    "food": (1, "a photo of {}, a type of food.", "a photo of {}, a type of food.", "6db321c4c7f208"),
    "imagenet": (80, "a bad photo of a {}.", "a tattoo of the {}.", "717aaf1055595d"),
    "imagenet-7": (7, "itap of a {}.", "a photo of the small {}.", "521a62d0a05a42"),
    "pets": (1, "a photo of a {}, a type of pet.", "a photo of a {}, a type of pet.", "6d2ff729b46bfd"),
}


def test_clips_sets_of_templates():
    """Read as files of templates are, they are CLIP's, to the letter."""
    assert {*TEMPLATES} == {*OF_CLIP}
    for name, (number, first, last, digest) in OF_CLIP.items():
        lines = read_list(TEMPLATES[name])
        assert (len(lines), lines[0], lines[-1]) == (number, first, last)
        assert hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest().startswith(digest)


def test_a_set_of_templates_by_its_name(here):
    """As if its lines were given in a file; a file of that name goes before it."""
    options = {"pairs": here / "t.csv", "classes": here / "classes.txt", "class_column": "label"}
    by_name = evaluate("a.ckpt", EvaluateOptions(templates=Path("imagenet-7"), **options))
    images, classes = embeddings("a.ckpt", here, tuple(read_list(TEMPLATES["imagenet-7"])))
    right = (images @ classes.T).argmax(1) == np.arange(12) % 3
    assert by_name["zero_shot"].top1 == pytest.approx(right.mean())
    Path("imagenet-7").write_text("no place\n")
    with pytest.raises(UserError, match=r"has no \{\}"):
        evaluate("a.ckpt", EvaluateOptions(templates=Path("imagenet-7"), **options))


def test_an_unknown_set_of_templates(here):
    """A name that is neither a file nor a set: both are named."""
    with pytest.raises(UserError, match=r"imagnet: neither a file .* imagenet-7"):
        evaluate("a.ckpt", EvaluateOptions(here / "pairs", here / "classes.txt", Path("imagnet")))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--by colour", "expected one 'colour'"),
        ("--by number", "1,001 different values among 1,001 images"),
        ("--by place --json .", "is not a regular file"),
        ("--by place --confusion c.png/c.png --classes classes.txt --class_column label", "c.png"),
    ],
)
def test_what_would_be_in_vain_is_refused_before_anything_is_embedded(here, monkeypatch, words, expected):
    """A column that is missing or of too many values, and a file that cannot be written."""
    (here / "c.png").write_text("a file")
    if "number" in words:
        for place in range(1001):
            (here / f"{place}.png").hardlink_to(here / "pairs/000.png")
        rows = [f"{place}.png,picture {place},{place}" for place in range(1001)]
        (here / "t.csv").write_text("\n".join(["image,caption,number", *rows]))

    def embedding(*_: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr("train_clip.evaluation.embed.embed_images", embedding)
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "a.ckpt", "--pairs", "t.csv", *words.split()])
    assert expected in said(stop)
