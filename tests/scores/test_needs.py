"""What ``evaluate`` says before it begins: nothing where little is to be done, else about how much."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_pairs
from train_clip.checkpoints.load import Pretrained
from train_clip.data.crops import Preprocess
from train_clip.data.tokenizer import Tokenizer
from train_clip.evaluation.collect import ScoreOptions, find
from train_clip.models.clip import CLIP
from train_clip.scores import needs


@pytest.fixture
def loaded(tiny_config: Any) -> Pretrained:
    torch.manual_seed(0)
    model = CLIP(tiny_config).eval()
    normed = Preprocess(tiny_config.image.size, model.pixel_norm.mean, model.pixel_norm.std)
    return Pretrained(model, normed, Tokenizer(tiny_config.text.context))


@pytest.fixture
def options(tmp_path: Path) -> ScoreOptions:
    """150 images, one of them no image, with two captions each."""
    folder = write_pairs(tmp_path / "pairs", 150)
    (folder / "000.png").write_bytes(b"no image")
    return ScoreOptions(folder)


def test_little_is_not_spoken_of(loaded, options, capsys):
    """A second of work."""
    needs.say(loaded, find(options)[0], options)
    needs.say(loaded, find(options)[0][:50], options)
    assert capsys.readouterr().out == ""


def test_what_takes_long_is_told(loaded, options, capsys, monkeypatch):
    """An image takes 0.1 s and a caption 0.05 s: 150 of the one and 300 of the other, 30 s in all, or a little more."""

    def slow(original: Any, seconds: float) -> Any:
        def wrapped(_: Any, some: Any, *further: Any) -> torch.Tensor:
            time.sleep(seconds * len(some))
            return original(_, some, *further)

        return wrapped

    monkeypatch.setattr(needs, "LONG", 5)
    monkeypatch.setattr(needs.embed, "embed_images", slow(needs.embed.embed_images, 0.1))
    monkeypatch.setattr(needs.embed, "embed_texts", slow(needs.embed.embed_texts, 0.05))
    needs.say(loaded, find(options)[0], options)
    found = re.fullmatch(
        r"150 images, about 300 captions, 0 classes: about (\d+) s, done at about .*\. Their embeddings take \d+ kB of "
        r"memory\.\n",
        capsys.readouterr().out,
    )
    assert found and 30 <= int(found[1]) <= 45


def test_much_memory_is_told(loaded, options, capsys, monkeypatch):
    """The embeddings' own bytes: 150 images, 300 captions."""
    memory = 4 * loaded.model.embed_dim * 450
    monkeypatch.setattr(needs, "LARGE", memory)
    needs.say(loaded, find(options)[0], options)
    assert f"Their embeddings take {memory / 1e3:,.0f} kB of memory" in capsys.readouterr().out


def test_where_nothing_can_be_read_nothing_is_said(loaded, options, capsys):
    """What is wrong is said by what follows."""
    for path in options.folder.glob("*.png"):
        path.write_bytes(b"no image")
    needs.say(loaded, find(options)[0], options)
    assert capsys.readouterr().out == ""
