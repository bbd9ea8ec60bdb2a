"""Sound archives: what comes out is what ``torch.load`` itself gives."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.checkpoints.by_hand import many, number, read_all, refusal, state, tensor, write
from train_clip.checkpoints.read import KINDS, TensorRecord, read_archive, read_tensors


def as_here(tensor: Tensor) -> Tensor:
    """Floating point of any width is float32 here."""
    return tensor.detach().float() if tensor.is_floating_point() else tensor


def assert_same(found: Tensor, loaded: Tensor) -> None:
    """Type, shape and every bit of the numbers, NaN included."""
    loaded = as_here(loaded)
    assert (found.dtype, found.shape) == (loaded.dtype, loaded.shape)
    torch.testing.assert_close(found, loaded, rtol=0, atol=0, equal_nan=True)


def assert_as_torch_loads(path: Path) -> None:
    """Every tensor of a state dict against ``torch.load``'s."""
    loaded = torch.load(path, weights_only=True)
    found = read_all(path)
    assert list(found) == list(loaded)
    for name, value in loaded.items():
        assert_same(found[name], value)


def tensors_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every way in which a tensor may lie in its storage."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-100, 100, (4, 6), generator=generator).div(7).to(dtype)
    return {
        "plain": grid,
        "transposed": grid.T,
        "every other": grid[::2, 1::2],
        "one number": grid[2, 3],
        "a row": grid[1],
        "last": grid.reshape(-1)[-1:],
        "expanded": grid[:1, :1].clone().expand(1, 1),
        "of no dimension": torch.tensor(3, dtype=dtype),
        "contiguous": grid.T.contiguous(),
        "four dimensions": grid.reshape(2, 2, 3, 2).permute(3, 0, 2, 1),
        "channels last": grid.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("name", KINDS)
def test_every_type_and_layout(tmp_path: Path, name: str) -> None:
    """Views of one storage and tensors of their own, in each type that has a name here, against torch.load."""
    torch.save(tensors_of(getattr(torch, name)), tmp_path / "a.pt")
    assert_as_torch_loads(tmp_path / "a.pt")


@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_no_elements(tmp_path: Path, name: str) -> None:
    """Type and shape of what holds nothing, against torch.load."""
    dtype = getattr(torch, name)
    empty = {"a": torch.empty(0, dtype=dtype), "b": torch.empty(3, 0, 2, dtype=dtype), "c": torch.ones(4).to(dtype)[4:]}
    torch.save(empty, tmp_path / "a.pt")
    assert_as_torch_loads(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_that_are_none(tmp_path: Path, name: str) -> None:
    """NaN, infinities, the negative zero, the least and the greatest of the type, bit for bit as float32."""
    dtype = getattr(torch, name)
    limits = torch.finfo(dtype)
    numbers = [math.nan, math.inf, -math.inf, -0.0, limits.tiny, limits.max, limits.smallest_normal / 2, limits.eps]
    torch.save({"a": torch.tensor(numbers, dtype=dtype)}, tmp_path / "a.pt")
    assert_as_torch_loads(tmp_path / "a.pt")
    assert math.copysign(1, read_all(tmp_path / "a.pt")["a"][3].item()) == -1


def test_whole_numbers_stay_what_they_are(tmp_path: Path) -> None:
    """The limits of each type, which float32 could not hold."""
    kinds = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    limits = {str(kind): torch.tensor([torch.iinfo(kind).min, torch.iinfo(kind).max], dtype=kind) for kind in kinds}
    torch.save(limits, tmp_path / "a.pt")
    assert_as_torch_loads(tmp_path / "a.pt")


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    """Tied weights and overlapping views: each as torch.load has it, contiguous, and its own to be written to."""
    whole = torch.randn(6)
    torch.save({"a": whole, "tied": whole, "part": whole[2:5], "turned": whole.view(2, 3).T}, tmp_path / "a.pt")
    assert_as_torch_loads(tmp_path / "a.pt")
    for name in ("a", "tied", "part", "turned"):
        found = read_all(tmp_path / "a.pt")
        assert all(tensor.is_contiguous() for tensor in found.values())
        others = {other: tensor.clone() for other, tensor in found.items() if other != name}
        found[name].fill_(7)
        assert all(torch.equal(found[other], tensor) for other, tensor in others.items())


def test_parameters_and_a_state_dict_with_its_metadata(tmp_path: Path) -> None:
    """``state_dict()`` is an OrderedDict with an attribute; a dict of parameters needs another function."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, 2)).half()
    assert model.state_dict()._metadata
    for held in (model.state_dict(), dict(model.named_parameters()), OrderedDict(model.named_buffers())):
        torch.save(held, tmp_path / "a.pt")
        assert_as_torch_loads(tmp_path / "a.pt")


def test_a_checkpoint_with_its_optimizer(tmp_path: Path) -> None:
    """State dict, moments of AdamW after a step, a schedule and plain data: the same tree as torch.load's."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=False, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    held = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "plain": {
            "step": 7,
            "big": 2**1000,
            "less": -(2**70),
            "rate": 1e-4,
            "none": None,
            "yes": True,
            "t": ((), (1,)),
        },
        3: [1, [2, [3]]],
    }
    torch.save(held, tmp_path / "a.ckpt")
    assert_same_tree(read_archive(tmp_path / "a.ckpt"), torch.load(tmp_path / "a.ckpt", weights_only=True))
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    for name, value in read_all(tmp_path / "a.ckpt").items():
        assert_same(value, loaded[name])


def assert_same_tree(found: Any, loaded: Any) -> None:
    """Plain data and tensors, nested, by hand."""
    if isinstance(loaded, Tensor):
        assert isinstance(found, TensorRecord)
        assert_same(read_tensors({"": found})[""], loaded)
    elif isinstance(loaded, dict):
        assert list(found) == list(loaded)
        for key, value in loaded.items():
            assert_same_tree(found[key], value)
    elif isinstance(loaded, list | tuple):
        assert isinstance(found, list if isinstance(loaded, list) else tuple)
        assert len(found) == len(loaded)
        for one, other in zip(found, loaded, strict=True):
            assert_same_tree(one, other)
    else:
        assert type(found) is type(loaded)
        assert found == loaded or (found != found and loaded != loaded)


SIZES = st.lists(st.integers(0, 3), max_size=3)
TENSORS = st.builds(
    lambda sizes, kind, steps, turned: (
        torch.arange(math.prod(sizes) * steps).to(getattr(torch, kind))[::steps].reshape(sizes).permute(
            tuple(range(len(sizes))[::-1] if turned else range(len(sizes)))
        )
    ),
    SIZES.map(lambda sizes: [size + 1 for size in sizes]),
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 3),
    st.booleans(),
)  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**2000), 2**2000),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    TENSORS,
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(-5, 2**40), st.none()), inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(held=st.dictionaries(st.text(max_size=5), TREES, max_size=5))
def test_any_plain_data(held: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nested lists, tuples, dicts, numbers, words and tensors: the same tree as torch.load's."""
    path = tmp_path_factory.getbasetemp() / "tree.pt"
    torch.save(held, path)
    assert_same_tree(read_archive(path), torch.load(path, weights_only=True))


def test_data_beside_the_weights_that_is_not_plain(tmp_path: Path) -> None:
    """Other things that checkpoints hold beside their weights do not keep the weights from being read.

    What ``torch.load(weights_only=True)`` takes, and the classes that ``read.HARMLESS`` names.
    """
    beside = {
        "a set": {1, 2},
        "a complex number": 1j,
        "a dict of dicts": defaultdict(dict, {1: {}}),
        "a queue": deque([1, 2]),
        "a count": Counter("aab"),
        "bytes": b"abc",
        "a path": Path("a/b"),
        "a number of numpy": np.float64(1.5),
        "an array": np.arange(3),
        "a type": torch.float16,
        "a device": torch.device("cpu"),
        "a size": torch.Size([1, 2]),
    }
    refused = {}
    for name, value in beside.items():
        torch.save({"state_dict": {"w": torch.arange(4.0)}, "beside": value}, tmp_path / "a.pt")
        try:
            assert torch.equal(read_all(tmp_path / "a.pt")["w"], torch.arange(4.0))
        except Exception as error:
            refused[name] = str(error)
    assert not refused


def test_tensors_that_are_not_read_are_refused_by_their_type(tmp_path: Path) -> None:
    """Complex, 8-bit floating point, unsigned, sparse: none comes out as another; the message says the type."""
    kinds = {
        "complex": torch.ones(2, dtype=torch.complex64),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "uint16": torch.ones(2, dtype=torch.uint16),
        "sparse": torch.eye(2).to_sparse(),
    }
    messages = {}
    for name, value in kinds.items():
        torch.save({"w": value}, tmp_path / "a.pt")
        messages[name] = refusal(tmp_path / "a.pt")
    assert "Complex" in messages["complex"]
    assert "sparse" in messages["sparse"]


def test_a_tensor_whose_sign_is_a_mark_beside_it(tmp_path: Path) -> None:
    """The imaginary part of a conjugate: its minus is no number of the storage. Its true numbers, or a refusal."""
    lazily = torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj().imag
    assert lazily.is_neg()
    torch.save({"w": lazily}, tmp_path / "a.pt")
    try:
        found = read_all(tmp_path / "a.pt")["w"]
    except Exception:
        refusal(tmp_path / "a.pt")
    else:
        assert torch.equal(found, torch.load(tmp_path / "a.pt", weights_only=True)["w"])


def test_archives_made_by_hand_are_sound(tmp_path: Path) -> None:
    """What the other files of tests damage is right before: torch.load reads it too."""
    write(tmp_path / "a.pt", state(w=tensor(), v=tensor(shape=many(number(2), number(2)), stride=many(number(1)) * 2)))
    refusal(tmp_path / "a.pt")  # two tuples in place of one
    write(tmp_path / "a.pt", state(w=tensor(), v=tensor(shape=many(*[number(2)] * 2), stride=many(*[number(1)] * 2))))
    assert_as_torch_loads(tmp_path / "a.pt")
