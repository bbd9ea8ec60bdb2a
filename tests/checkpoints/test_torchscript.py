"""TorchScript archives, as OpenAI's files are: what comes out is what ``torch.jit.load`` itself gives."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints.by_hand import tiny_clip
from train_clip.checkpoints.read import read_tensors
from train_clip.checkpoints.sources import read_contents

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Part(nn.Module):
    """Attributes of every kind that a script holds besides its tensors, and submodules that are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.LayerNorm(3)))
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.number, self.word, self.rate, self.nothing, self.big = 3, "word", 0.5, None, 2**40
        self.pair = (1, "x")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.counts + self.number + self.rate + self.passing.sum() + self.pair[0]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path: Path, how: str, half: bool) -> None:
    """Every tensor of ``torch.jit.load``'s state dict, and the one that is not persistent besides."""
    module = Part().eval()
    made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.randn(2, 3))
    (made.half() if half else made).save(str(tmp_path / "a.pt"))
    assert_as_jit_loads(tmp_path / "a.pt", {"passing"})


@pytest.mark.parametrize("half", [False, True])
def test_a_traced_clip(tmp_path: Path, half: bool) -> None:
    """The towers of a CLIP, as OpenAI's files have them: each tensor of ``torch.jit.load``'s state dict."""
    model = tiny_clip().visual
    made = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
    (made.half() if half else made).save(str(tmp_path / "a.pt"))
    assert_as_jit_loads(tmp_path / "a.pt", set())


def assert_as_jit_loads(path: Path, besides: set[str]) -> None:
    contents = read_contents(path)
    assert contents.kind == "TorchScript archive"
    loaded = torch.jit.load(str(path)).state_dict()
    found = read_tensors(contents.tensors)
    assert set(found) == set(loaded) | besides
    for name, value in loaded.items():
        expected = value.detach().float() if value.is_floating_point() else value
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


class WithLists(nn.Module):
    """Attributes that a script keeps with their type."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.counts = torch.jit.Attribute({"a": 1}, typing.Dict[str, int])  # noqa: UP006
        self.sizes, self.words = [1, 2], ["a"]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.counts["a"] + self.sizes[0] + len(self.words)


def test_torchscript_with_lists_and_dicts(tmp_path: Path) -> None:
    """Attributes that are lists and dicts, which a script writes with a function of its own around them."""
    torch.jit.script(WithLists()).save(str(tmp_path / "a.pt"))
    assert_as_jit_loads(tmp_path / "a.pt", set())
