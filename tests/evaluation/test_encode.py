"""``encode`` of what ``load`` returns, against one image or caption at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_pairs
from train_clip.checkpoints.load import Pretrained
from train_clip.data.crops import Preprocess
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import BadSample, WrongType
from train_clip.models.clip import CLIP

CAPTIONS = ["a", "", "a red ring at the top left of a very long picture indeed", "two words", "a"] * 3


@pytest.fixture
def loaded(tiny_config: Any) -> Pretrained:
    torch.manual_seed(0)
    model = CLIP(tiny_config).eval()
    return Pretrained(
        model, Preprocess(16, model.pixel_norm.mean, model.pixel_norm.std), Tokenizer(tiny_config.text.context)
    )


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return sorted(write_pairs(tmp_path / "pairs", 7, 24).glob("*.png"))


@torch.no_grad()
def one_by_one(loaded: Pretrained, paths: list[Path]) -> torch.Tensor:
    rows = torch.cat([loaded.model.encode_image(loaded.preprocess(str(path))[None]) for path in paths])
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_images_in_every_form(loaded: Pretrained, paths: list[Path], num_workers: int, batch_size: int) -> None:
    """Paths, pictures, arrays, tensors, all of them mixed, and an iterator: the same rows in the same order."""
    expected = one_by_one(loaded, paths).numpy()
    pictures = [Image.open(path).convert("RGB") for path in paths]
    mixed = [paths[0], pictures[1], np.asarray(pictures[2]), *pictures[3:]]
    for items in (paths, pictures, list(map(np.asarray, pictures)), mixed, iter(paths)):
        found = loaded.encode(items, batch_size=batch_size, num_workers=num_workers)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    tensors = torch.stack([loaded.preprocess(str(path)) for path in paths])
    for items in (tensors, list(tensors)):
        np.testing.assert_allclose(loaded.encode(items, batch_size=batch_size), expected, atol=1e-6)
    np.testing.assert_allclose(loaded.encode(paths[3]), expected[3:4], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_captions_without_padding(loaded: Pretrained, batch_size: int) -> None:
    """In their order, as each alone with all its padding."""
    with torch.no_grad():
        rows = loaded.model.encode_text(loaded.tokenizer(CAPTIONS))
    expected = rows / rows.norm(dim=1, keepdim=True)
    for items in (CAPTIONS, iter(CAPTIONS), tuple(CAPTIONS)):
        torch.testing.assert_close(loaded.encode(items, batch_size=batch_size, as_tensor=True), expected)
    torch.testing.assert_close(loaded.encode("two words", as_tensor=True), expected[3:4])
    torch.testing.assert_close(loaded.encode(CAPTIONS, normalize=False, as_tensor=True), rows)
    lengths = []
    loaded.model.transformer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    loaded.encode(CAPTIONS, batch_size=3)
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[-1] > 8


def test_nothing_gives_no_rows(loaded: Pretrained) -> None:
    assert loaded.encode([]).shape == (0, loaded.model.embed_dim)


def test_what_cannot_be_read(loaded: Pretrained, paths: list[Path]) -> None:
    """By choice an error that names the first, or rows of NaN among the others."""
    expected = one_by_one(loaded, paths)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    gone = [*paths[:5], Path("nowhere.png"), *paths[5:]]
    with pytest.raises(BadSample, match=r"002\.png: "):
        loaded.encode(gone)
    with pytest.raises(FileNotFoundError):
        loaded.encode(Path("nowhere.png"))
    for batch_size in (1, 2, 64):
        found = loaded.encode(gone, unreadable="nan", batch_size=batch_size, as_tensor=True)
        assert found.isnan().all(dim=1).nonzero().flatten().tolist() == [2, 5]
        kept = [0, 1, 3, 4, 6, 7]
        torch.testing.assert_close(found[kept], expected[[0, 1, 3, 4, 5, 6]])


def test_kinds_are_not_mixed(loaded: Pretrained, paths: list[Path]) -> None:
    """A caption among images, which may be meant as a path, and the other way round; a number."""
    with pytest.raises(WrongType, match=r"the caption 'cat\.jpg' among images.*give pathlib\.Path"):
        loaded.encode([paths[0], "cat.jpg"])
    with pytest.raises(WrongType, match="among captions"):
        loaded.encode(["a", paths[0]])
    with pytest.raises(WrongType, match="int"):
        loaded.encode([3, 4])


def test_memory_is_bounded(loaded: Pretrained, paths: list[Path]) -> None:
    """Of an iterator only some batches are taken ahead; the model is left as it was."""
    taken = []

    def endless() -> Iterator[Path]:
        while True:
            taken.append(len(taken))
            if len(taken) == 100:
                raise RuntimeError("enough")
            yield paths[0]

    from train_clip.evaluation.encode import batches

    loaded.model.train()
    first = next(batches(loaded.model, loaded.tokens, endless(), 4, 2))[0]
    assert first.shape == (4, loaded.model.embed_dim) and len(taken) < 16
    assert loaded.model.training and not first.requires_grad


def test_a_bar(loaded: Pretrained, paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    loaded.encode(iter(paths), progress=True)
    loaded.encode(paths, progress=True)
    assert "encoding" in capsys.readouterr().out
