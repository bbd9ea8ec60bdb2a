"""``train-clip evaluate``: what is scored, against figures worked out by hand from the embeddings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image

from tests.conftest import said, write_pairs
from train_clip import CLIPWrapper, cli, load
from train_clip.commands.evaluate import EvaluateOptions, evaluate
from train_clip.errors import UserError
from train_clip.evaluation.zero_shot import read_list


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config) -> Path:
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=0, enable_progress_bar=False
    )
    trainer.strategy.connect(CLIPWrapper("tiny", tiny_config))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_retrieval_counts_every_caption_of_an_image(pair_folder, checkpoint):
    """Two captions an image: R@k both ways against a loop over sorted similarities."""
    scores = evaluate(checkpoint, EvaluateOptions(pair_folder, batch_size=5))
    model = CLIPWrapper.load_from_checkpoint(checkpoint)
    stems = [f"{index:03}" for index in range(12)]
    images = model.embed_images([pair_folder / f"{stem}.png" for stem in stems])
    captions = [
        (n, line) for n, stem in enumerate(stems) for line in (pair_folder / f"{stem}.txt").read_text().split("\n")[:2]
    ]
    similarity = images @ model.embed_texts([line for _, line in captions]).T
    for k in (1, 5, 10):
        hits = [any(captions[j][0] == i for j in row.argsort(descending=True)[:k]) for i, row in enumerate(similarity)]
        assert scores["retrieval"].image_to_text[k] == pytest.approx(sum(hits) / 12)
        hits = [captions[j][0] in column.argsort(descending=True)[:k] for j, column in enumerate(similarity.T)]
        assert scores["retrieval"].text_to_image[k] == pytest.approx(sum(hits) / 24)
    assert (scores["num_images"], scores["num_captions"]) == (12, 24)


def test_captions_of_equal_tokens_are_one(tmp_path, tiny_config, checkpoint):
    """Two captions of four images each, that differ in case, blanks, entities and behind the cut: as if word for word.

    At chance half of the first guesses are right. The picture knows it too.
    """
    long = " ".join(f"word{number}" for number in range(tiny_config.text.context))
    variants = {
        "same": (["a cat & a dog"] * 4, [f"{long} the same end"] * 4),
        "tokens": (["a cat & a dog", "A  Cat &  a DOG", "a cat &amp; a dog", "a cat\u3000& a dog"],
                   [f"{long} {end}" for end in ("one", "two", "three", "the fourth end")]),
    }  # fmt: skip
    found = {}
    for name, (short, cut) in variants.items():
        folder = write_pairs(tmp_path / name, 8)
        for place, caption in enumerate(short + cut):
            (folder / f"{place:03}.txt").write_text(caption, encoding="utf-8")
        found[name] = evaluate(checkpoint, EvaluateOptions(folder))["retrieval"]
    assert found["tokens"] == found["same"]
    assert found["tokens"].chance_text_to_image[1] == found["tokens"].chance_image_to_text[1] == 0.5


def test_a_runs_folder_stands_for_its_best_checkpoint(pair_folder, checkpoint, tmp_path, capsys):
    """The run, or its checkpoints' folder, by evaluate, inspect and in Python; the last one where none is best."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for names, expected in ((["last.ckpt"], "last.ckpt"), (["best.ckpt", "step-00000001.ckpt"], "best.ckpt")):
        for name in names:
            (folder / name).hardlink_to(checkpoint)
        for given in (folder, folder.parent):
            cli.main(["evaluate", str(given), "--folder", str(pair_folder)])
            assert f"Evaluating {folder / expected}.\n12 images, " in capsys.readouterr().out
            cli.main(["inspect", str(given)])
            assert f"{folder / expected}\n" in capsys.readouterr().out
            assert load(given).model.name == "tiny"
    with pytest.raises(UserError, match="a folder without weights"):
        load(tmp_path)


def test_classes_come_from_folders_and_from_cls_files(tmp_path, checkpoint):
    """Three images without captions, their classes by folder, by a name and by a number in STEM.cls."""
    folder = tmp_path / "classes"
    for place, cls in (("black_cat/a", None), ("b", "Dog"), ("c", "1")):
        path = folder / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 20), 90).convert("RGB").save(path)
        if cls is not None:
            path.with_suffix(".cls").write_text(cls)
    (tmp_path / "classes.txt").write_text("black cat\ndog\n")
    (tmp_path / "templates.txt").write_text("a {}\nmy {} here\n")
    options = EvaluateOptions(
        folder, tmp_path / "classes.txt", tmp_path / "templates.txt", json=tmp_path / "scores.json"
    )
    scores = evaluate(checkpoint, options)

    model = CLIPWrapper.load_from_checkpoint(checkpoint)
    centres = []
    for name in ("black cat", "dog"):
        mean = model.embed_texts([f"a {name}", f"my {name} here"]).mean(dim=0)
        centres.append(mean / mean.norm())
    # In the order of the paths: captionless images are sorted.
    images = model.embed_images([folder / "b.png", folder / "black_cat/a.png", folder / "c.png"])
    right = ((images @ torch.stack(centres).T).argmax(dim=1) == torch.tensor([1, 0, 1])).double().mean().item()
    assert scores["zero_shot"].top1 == pytest.approx(right)
    assert scores["zero_shot"].chance == 0.5
    assert scores["retrieval"] is None
    assert json.loads((tmp_path / "scores.json").read_text())["zero_shot"]["num_images"] == 3


def test_the_held_out_split_is_the_one_that_training_held_out(pair_folder, checkpoint):
    """``--split`` cuts as ``train --val_share`` does: both parts together are the folder, without overlap."""
    from train_clip.training.data_module import TextImageDataModule

    data = TextImageDataModule(pair_folder, 4, val_share=0.25)
    data.setup()
    parts = {
        split: evaluate(checkpoint, EvaluateOptions(pair_folder, split=split, val_share=0.25))
        for split in ("training", "held_out")
    }
    assert parts["training"]["num_images"] == len(data.training_pairs) == 9
    assert parts["held_out"]["num_images"] == len(data.validation_pairs) == 3


def test_what_cannot_be_read_is_left_out_and_named(pair_folder, checkpoint, capsys):
    """A broken image and an empty caption file: not scored, named, everything else scored."""
    (pair_folder / "003.png").write_bytes(b"no image")
    (pair_folder / "004.txt").write_text(" \n")
    scores = evaluate(checkpoint, EvaluateOptions(pair_folder))
    assert (scores["num_images"], scores["num_captions"]) == (11, 20)
    assert {Path(skip.path).name: skip.reason for skip in scores["skips"]} == {
        "003.png": "not an image that Pillow can read",
        "004.txt": "caption is empty",
    }
    assert "003.png" in capsys.readouterr().out


def test_what_has_no_partner_is_left_out_and_counted(pair_folder, checkpoint, tmp_path, capsys):
    """Images without captions, and captions without images; with classes those images count."""
    for name in ("003.txt", "004.txt", "007.png"):
        (pair_folder / name).unlink()
    evaluate(checkpoint, EvaluateOptions(pair_folder))
    printed = capsys.readouterr().out
    assert "2 images have no caption, such as 003.png.\n1 captions have no image, such as 007.txt.\n" in printed
    (tmp_path / "classes.txt").write_text("pairs\nother\n")
    assert evaluate(checkpoint, EvaluateOptions(pair_folder, tmp_path / "classes.txt"))["num_images"] == 11
    assert "have no caption" not in capsys.readouterr().out


def test_a_picture_is_drawn(pair_folder, checkpoint, tmp_path, drawn):
    """``--picture`` writes a PNG."""
    cli.main(["evaluate", str(checkpoint), "--folder", str(pair_folder), "--picture", str(tmp_path / "best.png")])
    assert Image.open(tmp_path / "best.png").size[0] > 500


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_refused(pair_folder, tmp_path, content):
    """Empty, text and truncated files: an error that names the file and what was expected."""
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.ckpt: (begins with b'|not weights, or damaged \(BadZipFile)"):
        evaluate(path, EvaluateOptions(pair_folder))


def test_a_checkpoint_with_a_flipped_byte_is_refused(pair_folder, checkpoint, tmp_path):
    """One bit of a weight: PyTorch itself would load it."""
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(UserError, match=r"flipped\.ckpt: damaged \(Bad CRC-32 for file .*\)\. Get the file again"):
        evaluate(path, EvaluateOptions(folder=pair_folder))


def test_an_image_of_no_class_is_refused(pair_folder, checkpoint, tmp_path):
    """A folder that is none of the classes: which image, which class, what to do."""
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"000\.png: its class is 'pairs' by its folder .*not one of the 2 classes"):
        evaluate(checkpoint, EvaluateOptions(pair_folder, tmp_path / "classes.txt"))


def test_a_template_without_a_place_for_the_class_is_refused(pair_folder, checkpoint, tmp_path):
    """Every class would get the same caption."""
    (tmp_path / "classes.txt").write_text("pairs\nother\n")
    (tmp_path / "templates.txt").write_text("a {}\na photo\n")
    with pytest.raises(UserError, match=r"templates\.txt, line 2: 'a photo' has no {}"):
        evaluate(checkpoint, EvaluateOptions(pair_folder, tmp_path / "classes.txt", tmp_path / "templates.txt"))


@pytest.fixture
def spoiled(checkpoint):
    """Write a checkpoint with some of its tensors multiplied by a number; give its path."""

    def spoil(number: float, *names: str) -> Path:
        content = torch.load(checkpoint, weights_only=True)
        for name in names:
            content["state_dict"][f"model.{name}"].mul_(number)
        torch.save(content, checkpoint.with_name("spoiled.ckpt"))
        return checkpoint.with_name("spoiled.ckpt")

    return spoil


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "words",
    [
        "evaluate {} --folder pairs --json scores.json",
        "convert {} model.safetensors",
        "train --pretrained {} --folder pairs --output run --val_share 0 --batch_size 4 --num_workers 0",
        "finetune --pretrained {} --folder pairs --output run --val_share 0 --batch_size 4 --num_workers 0",
        "merge model.ckpt {}",
        "merge {} model.ckpt",
    ],
)
def test_weights_that_are_not_finite_are_refused(pair_folder, spoiled, monkeypatch, capsys, words, number):
    """Two tensors of NaN or infinity: named, with how many, and no score, file or advice on the learning rate."""
    monkeypatch.chdir(pair_folder.parent)
    path = spoiled(number, "ln_final.weight", "visual.proj")
    before = set(Path().iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main(words.format(path).split())
    printed, message = capsys.readouterr().out, said(stop)
    assert re.search(r"spoiled\.ckpt: 2 of its \d+ tensors hold NaN or infinity, such as (visual|ln_final)", message)
    assert "learning_rate" not in message
    assert "R@1" not in printed
    assert set(Path().iterdir()) == before
    with pytest.raises(UserError, match="hold NaN or infinity"):
        load(path)


@pytest.mark.parametrize(
    ("tensors", "classes", "expected"),
    [
        (
            "visual.ln_post.weight visual.proj",
            None,
            r"000\.png: its embedding is not finite .* 12 such among 12 images",
        ),
        (
            "ln_final.weight text_projection",
            None,
            r"picture 0: its embedding is not finite .* 24 such among 24 captions",
        ),
        ("ln_final.weight text_projection", "pairs\nother\n", r"its embedding is not finite"),
    ],
)
def test_embeddings_that_are_not_finite_get_no_score(
    pair_folder, spoiled, tmp_path, capsys, tensors, classes, expected
):
    """Weights that are finite, but so large that what they make is not: which image or caption, and how many."""
    (tmp_path / "classes.txt").write_text(classes or "")
    if classes:
        for caption in pair_folder.glob("*.txt"):
            caption.unlink()
    options = EvaluateOptions(pair_folder, tmp_path / "classes.txt" if classes else None, json=tmp_path / "scores.json")
    with pytest.raises(UserError, match=expected):
        evaluate(spoiled(1e30, *tensors.split()), options)
    assert "R@1" not in capsys.readouterr().out
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("tensor", ["visual.proj", "text_projection"])
def test_a_collapsed_model_is_said_to_be_one(pair_folder, spoiled, checkpoint, tmp_path, capsys, tensor):
    """All images, or all captions and class names, at one point: a line says which; a sound model gets none."""
    (tmp_path / "classes.txt").write_text("pairs\nother\n")
    options = EvaluateOptions(pair_folder, tmp_path / "classes.txt")
    assert evaluate(checkpoint, options)["collapse"] is None
    assert "Collapsed" not in capsys.readouterr().out
    scores = evaluate(spoiled(0.0, tensor), options)
    what = "all images" if tensor == "visual.proj" else "all captions and all class names"
    assert f"Collapsed: {what} have the same embedding" in capsys.readouterr().out
    assert scores["retrieval"].image_to_text[1] == scores["zero_shot"].top1 == 0


def test_a_merge_says_which_model_is_collapsed(pair_folder, spoiled, checkpoint, monkeypatch, capsys):
    """A sound model at weight 0, all images at one point at weight 1."""
    monkeypatch.chdir(pair_folder.parent)
    cli.main(["merge", str(checkpoint), str(spoiled(0.0, "visual.proj")), "--folder", "pairs"])
    printed = capsys.readouterr().out
    assert "Weight 1: Collapsed: all images have the same embedding" in printed
    assert "Weight 0:" not in printed


def test_equal_captions_are_no_collapse(pair_folder, checkpoint):
    """One caption for all images is the data's doing, not the model's; nothing can be found wrong, or scored."""
    for caption in pair_folder.glob("*.txt"):
        caption.write_text("the same\nThe Same\n")
    scores = evaluate(checkpoint, EvaluateOptions(pair_folder))
    assert scores["collapse"] is None
    assert scores["retrieval"].image_to_text == scores["retrieval"].text_to_image == {}


def test_what_every_guess_finds_is_not_shown(tmp_path, checkpoint, capsys):
    """Seven images of three captions each, and two classes: R@10 of images and top-5 are 100% for any model."""
    folder = write_pairs(tmp_path / "pairs", 7)
    for place in range(7):
        (folder / f"{place:03}.txt").write_text(f"first {place}\nsecond {place}\nthird {place}\n")
    (tmp_path / "classes.txt").write_text("pairs\nother\n")
    scores = evaluate(checkpoint, EvaluateOptions(folder, tmp_path / "classes.txt", json=tmp_path / "scores.json"))
    assert list(scores["retrieval"].image_to_text) == [1, 5, 10]  # of 21 captions
    assert list(scores["retrieval"].text_to_image) == list(scores["retrieval"].chance_text_to_image) == [1, 5]
    assert scores["zero_shot"].top5 is None
    printed = capsys.readouterr().out
    assert "top-5" not in printed
    three = r"( +\d+\.\d% +\[\d+\.\d%, \d+\.\d%\] +\d+\.\d%)"
    assert re.search(rf"R@5{three}{{2}}", printed)
    assert re.search(rf"R@10{three} *\n", printed)


@pytest.mark.parametrize(
    ("classes", "templates", "expected"),
    [
        ("cat\n\ndog\n", None, r"classes\.txt, line 2: ''"),
        ("\ncat\ndog\n", None, r"classes\.txt, line 1: ''"),
        ("cat\n&nbsp;\ndog\n", None, r"classes\.txt, line 2: '&nbsp;'"),
        ("cat\ndog\nCat\n", None, r"classes\.txt, line 3: 'Cat', as in line 1"),
        ("hot_dog\ncat\nhot  dog\n", None, r"classes\.txt, line 3: 'hot  dog', as in line 1"),
        ("caf\u00e9\ncat\ncafe\u0301\n", None, r"classes\.txt, line 3: .*, as in line 1"),
        ("cat\n\ufeffcat\n", None, r"classes\.txt, line 2: .*cat', as in line 1"),
        ('["cat", "dog"]\n', None, r"classes\.txt, line 1: .* none blank, repeated or JSON"),
        ('[\n  "cat",\n  "dog"\n]\n', None, r"classes\.txt, line 1: .* none blank, repeated or JSON"),
        ('{"0": "cat"}\n', None, r"classes\.txt, line 1: .* none blank, repeated or JSON"),
        ('cat\n"dog"\n', None, r"classes\.txt, line 2: .* none blank, repeated or JSON"),
        ("cat\n'dog',\n", None, r"classes\.txt, line 2: .* none blank, repeated or JSON"),
        ("cat\n\"dog\": 1,\n", None, r"classes\.txt, line 2: .* none blank, repeated or JSON"),
        ("A & B\nA &amp; B\n", None, r"classes\.txt: 'A & B' and 'A &amp; B' have the same tokens"),
        ("cat\n", None, r"classes\.txt: 1 class\. Expected at least 2"),
        (" \n", None, r"classes\.txt: is empty"),
        ("cat\ndog\n", "a {}\n\nthe {}\n", r"templates\.txt, line 2: ''"),
        ("cat\ndog\n", "a {}\nA {}\n", r"templates\.txt, line 2: 'A {}', as in line 1"),
        ("cat\ndog\n", "'a photo of a {}.',\n", r"templates\.txt, line 1: .* none blank, repeated or JSON"),
        ("cat\ndog\n", "a {}\nthe {0}\n", r"templates\.txt, line 2: 'the \{0\}' has no {}"),
    ],
)  # fmt: skip
def test_lines_that_are_no_class_are_refused(pair_folder, checkpoint, tmp_path, classes, templates, expected):
    """By file and line: blank, repeated in any spelling of it, JSON and code; one class, or none."""
    (tmp_path / "classes.txt").write_text(classes, encoding="utf-8")
    (tmp_path / "templates.txt").write_text(templates or "", encoding="utf-8")
    options = EvaluateOptions(
        pair_folder, tmp_path / "classes.txt", tmp_path / "templates.txt" if templates is not None else None
    )
    with pytest.raises(UserError, match=expected):
        evaluate(checkpoint, options)


def test_lists_that_are_read_as_they_are_meant(tmp_path):
    """A byte order mark, CR LF, lines of Mac OS, blanks at the end; brackets, digits and quotes in names; {} alone."""
    path = tmp_path / "list.txt"
    for content, expected in (
        (b"\xef\xbb\xbfcat\r\ndog\r\n\r\n \r\n", ["cat", "dog"]),
        (b"cat\n\xef\xbb\xbfdog", ["cat", "dog"]),
        (b"cat\rdog\r", ["cat", "dog"]),
        (b"1\n0\n", ["1", "0"]),
        (b"null\n[other]\n", ["null", "[other]"]),
        (b"rock 'n' roll\n\"Weird Al\" Yankovic\n", ["rock 'n' roll", '"Weird Al" Yankovic']),
        (b"{}\n{} and {}\n", ["{}", "{} and {}"]),
    ):
        path.write_bytes(content)
        assert read_list(path) == expected
