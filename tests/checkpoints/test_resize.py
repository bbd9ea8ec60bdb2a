"""Positions of another size: restated with torch's own interpolation, and never resized unless asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.checkpoints.by_hand import tiny_clip
from tests.conftest import TINY
from train_clip import load
from train_clip.checkpoints.found import resize_image_positions, resize_text_positions
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.models.clip import CLIP

IMAGE, POOL, TEXT = "visual.positional_embedding", "visual.attnpool.positional_embedding", "positional_embedding"


def image_positions(positions: Tensor, side: int) -> Tensor:
    """(1 + G², W) to (1 + side², W), channel by channel."""
    places = round((len(positions) - 1) ** 0.5)
    grid = torch.empty(side * side, positions.shape[1])
    for channel in range(positions.shape[1]):
        square = torch.stack([positions[1 + row * places : 1 + (row + 1) * places, channel] for row in range(places)])
        grid[:, channel] = F.interpolate(square[None, None], (side, side), mode="bicubic", antialias=True).reshape(-1)
    return torch.cat([positions[:1], grid])


def text_positions(positions: Tensor, length: int) -> Tensor:
    """(L, W) to (length, W): place i lies at (i + ½) L / length - ½ between two of the old ones, kept within them."""
    if length <= len(positions):
        return positions[:length]
    rows = []
    for place in range(length):
        at = min(max((place + 0.5) * len(positions) / length - 0.5, 0), len(positions) - 1)
        before = int(at)
        after = min(before + 1, len(positions) - 1)
        rows.append(positions[before].double() * (1 - (at - before)) + positions[after].double() * (at - before))
    return torch.stack(rows).float()


@pytest.mark.parametrize("name", [IMAGE, POOL])
@pytest.mark.parametrize(("old", "new"), [(2, 3), (7, 4), (3, 12), (7, 1), (1, 5), (16, 24)])
def test_image_positions(name: str, old: int, new: int) -> None:
    """Each channel by itself through F.interpolate: 1e-6. The first position is kept bit for bit, and all else."""
    positions = torch.randn(1 + old * old, 5)
    tensors = {name: positions, TEXT: torch.randn(9, 5), "ln_final.weight": torch.randn(5)}
    resized = resize_image_positions(tensors, new)
    torch.testing.assert_close(resized[name], image_positions(positions, new), rtol=0, atol=1e-6)
    assert torch.equal(resized[name][0], positions[0])
    assert resized[name].is_contiguous()
    assert all(resized[other] is tensors[other] for other in tensors if other != name)


def test_rows_and_columns_are_not_exchanged() -> None:
    """A grid that rises along its rows alone still does when it is larger."""
    grid = torch.arange(4.0).repeat_interleave(4)[:, None]
    resized = resize_image_positions({IMAGE: torch.cat([torch.zeros(1, 1), grid])}, 8)[IMAGE][1:, 0].reshape(8, 8)
    assert (resized.diff(dim=0) > 0).all()
    torch.testing.assert_close(resized.diff(dim=1), torch.zeros(8, 7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 7])
def test_the_same_size_is_the_same_tensor(side: int) -> None:
    """Bit for bit, for images and for text; an infinity, which interpolation would spread, too."""
    positions = torch.randn(1 + side * side, 5)
    positions[1, 0] = torch.inf
    assert torch.equal(resize_image_positions({IMAGE: positions}, side)[IMAGE], positions)
    assert torch.equal(resize_text_positions({TEXT: positions}, len(positions))[TEXT], positions)


@pytest.mark.parametrize("side", [1, 3, 4, 14])
def test_a_grid_of_constants_stays_constant(side: int) -> None:
    """Two by two of one number each channel: that number everywhere, to a few units of the last place."""
    values = torch.tensor([3.0, -0.5, 1e-3])
    resized = resize_image_positions({IMAGE: torch.cat([torch.zeros(1, 3), values.expand(4, 3)])}, side)[IMAGE]
    assert resized.shape == (1 + side * side, 3)
    torch.testing.assert_close(resized[1:], values.expand(side * side, 3), rtol=1e-6, atol=0)
    assert (resized[0] == 0).all()


@pytest.mark.parametrize(("old", "new"), [(16, 5), (16, 1), (5, 16), (7, 8), (1, 4), (77, 248)])
def test_text_positions(old: int, new: int) -> None:
    """Fewer are the first, bit for bit; more are linear between the old ones, by a loop in float64: 2e-5."""
    positions = torch.randn(old, 3)
    tensors = {TEXT: positions, IMAGE: torch.randn(5, 3)}
    resized = resize_text_positions(tensors, new)
    torch.testing.assert_close(resized[TEXT], text_positions(positions, new), rtol=0, atol=2e-5 if new > old else 0)
    assert resized[IMAGE] is tensors[IMAGE]


@pytest.fixture(params=["ViT", "ResNet"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CLIP, Path]:
    """A model, and the file of it."""
    image: dict[str, Any] = {"size": 64, "blocks": [1, 1, 1, 1], "width": 4}
    model = tiny_clip() if request.param == "ViT" else tiny_clip(image=image)
    write_model(model, tmp_path / "a.safetensors", "safetensors")
    return model, tmp_path / "a.safetensors"


def test_a_model_for_other_sizes(saved: tuple[CLIP, Path]) -> None:
    """Loaded for larger images and longer captions: the positions as above, all else equal, and it runs."""
    model, path = saved
    name, size, side = (IMAGE, 24, 3) if IMAGE in model.state_dict() else (POOL, 96, 3)
    loaded = load(path, image_size=size, context_length=24)
    expected = dict(model.state_dict())
    expected[name] = image_positions(expected[name], side)
    expected[TEXT] = text_positions(expected[TEXT], 24)
    for key, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6 if key in (name, TEXT) else 0)
    assert loaded.model.image_size == size
    with torch.no_grad():
        assert loaded.model.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 16)
        tokens = loaded.tokenizer(["a word " * 30])
        assert tokens.shape[1] == 24
        assert loaded.model.encode_text(tokens).shape == (1, 16)


def test_the_models_own_sizes_change_nothing(saved: tuple[CLIP, Path]) -> None:
    """Asked for by name, they are what the file has: every tensor bit for bit."""
    model, path = saved
    loaded = load(path, image_size=model.image_size, context_length=16).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_nothing_is_resized_unless_asked(tmp_path: Path) -> None:
    """A file whose positions are of another number than its model's: both shapes, for images and for text."""
    other = tiny_clip(image=TINY["image"] | {"size": 24}, text=TINY["text"] | {"context": 20})
    for name, shapes in ((IMAGE, ((10, 16), (5, 16))), (TEXT, ((20, 16), (16, 16)))):
        model = tiny_clip()
        model.get_submodule(name.rpartition(".")[0]).positional_embedding = torch.nn.Parameter(other.state_dict()[name])
        write_model(model, tmp_path / f"{name}.safetensors", "safetensors")
        with pytest.raises(UserError) as caught:
            load(tmp_path / f"{name}.safetensors")
        assert f"{name} is {shapes[0]} numbers, expected {shapes[1]} numbers" in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ({"image_size": 20}, "20 is not a multiple of the patch 8"),
        ({"image_size": 4}, "4 is not a multiple of the patch 8"),
        ({"image_size": 0}, "size is 0"),
        ({"image_size": -8}, "size is -8"),
        ({"context_length": 1}, "context_length is 1"),
        ({"context_length": 0}, "context_length is 0"),
        ({"context_length": -3}, "context_length is -3"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, choices: dict[str, int], found: str) -> None:
    """The message names the size and the rule, and the file where it is the file's."""
    path = tmp_path / "a.safetensors"
    write_model(tiny_clip(), path, "safetensors")
    with pytest.raises(UserError) as caught:
        load(path, **choices)
    assert (str(path) in str(caught.value)) == ("patch" in found)
    assert found in str(caught.value)


@pytest.mark.parametrize("shape", [(6, 16), (1, 16), (0, 16), (16,), (5, 4, 4), ()])
def test_positions_that_are_no_grid(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Not 1 + G² rows, or not rows at all, with a size asked for or not: refused, and no other error."""
    model = tiny_clip()
    path = tmp_path / "a.safetensors"
    model.visual.positional_embedding = torch.nn.Parameter(torch.zeros(shape))
    write_model(model, path, "safetensors")
    for choices in ({}, {"image_size": 24}, {"image_size": 16}):
        with pytest.raises(UserError) as caught:
            load(path, **choices)
        assert str(path) in str(caught.value)
