"""``train-clip evaluate``: what is scored, against figures worked out by hand from the embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image

from train_clip import CLIPWrapper, cli, load
from train_clip.commands.evaluate import EvaluateOptions, evaluate
from train_clip.errors import UserError


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
    (tmp_path / "classes.txt").write_text("pairs\n")
    (tmp_path / "templates.txt").write_text("a {}\na photo\n")
    with pytest.raises(UserError, match=r"templates\.txt: 'a photo' has no {}"):
        evaluate(checkpoint, EvaluateOptions(pair_folder, tmp_path / "classes.txt", tmp_path / "templates.txt"))
