"""Gathering on two gloo processes against what each of them holds. The gradient of training: test_exact_gradient.py.

B  rows on a rank      W  ranks
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from two_processes import run

from train_clip.gather import gather_all, gather_with_gradient, largest, on_any, world

W, B = 2, 4
LENGTHS = (3, 5)  # rows that each rank brings to gather_all
FLAGS = ((False, True, False, True), (False, False, True, True))  # of each rank


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Everything below, run once on both processes: starting them is what takes time."""
    return run(everything, tmp_path_factory.mktemp("gather"), W)


def everything() -> dict[str, Any]:
    return {
        "world": world(),
        "gathered": gathered_gradient(),
        "beside": gradient_beside_the_gathered(),
        "unequal": [gather_all(rows) for rows in unequal(world()[0])],
        "largest": largest([world()[0], -world()[0], 2**40]),
        "on_any": [on_any(torch.tensor(flag)).item() for flag in FLAGS[world()[0]]],
    }


def weights(rank: int) -> Tensor:
    return torch.randn(W * B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def gathered_gradient() -> dict[str, Tensor]:
    """Gradient of each rank's own weighted sum over everyone's rows; the rows are no contiguous tensor."""
    rank, _ = world()
    columns = (10 * rank + torch.arange(3 * B, dtype=torch.float64)).view(3, B).requires_grad_()
    everyone = gather_with_gradient(columns.T)
    (everyone * weights(rank)).sum().backward()
    return {"rows": everyone.detach(), "gradient": columns.grad.T}


def gradient_beside_the_gathered() -> Tensor:
    """Gradient of a tensor that is only added to the gathered one, and so receives the very same gradient."""
    rank, _ = world()
    own = torch.ones(W * B, 3, dtype=torch.float64, requires_grad=True)
    doubled = own * 2
    rows = torch.ones(B, 3, dtype=torch.float64, requires_grad=True)
    ((gather_with_gradient(rows) + doubled) * weights(rank)).sum().backward()
    return own.grad


def unequal(rank: int) -> list[Tensor]:
    """Rows of different kinds and lengths; the last only the second rank has."""
    length = LENGTHS[rank]
    floats = rank + torch.arange(2.0 * length).view(length, 2)
    integers = 2**62 + rank + torch.arange(length)
    deep = rank + torch.arange(6.0 * length, dtype=torch.float64).view(length, 3, 2)
    return [floats, integers, deep, torch.full((rank, 2), 7.0)]


def test_world(results):
    """Each process knows its rank and their number; a process that is alone is the first of one."""
    assert [result["world"] for result in results] == [(0, 2), (1, 2)]
    assert world() == (0, 1)


def test_gathered_rows_and_their_gradient(results):
    """Rows in the order of the ranks, equal on both; a row's gradient is the sum of what both ranks send it: 1e-12."""
    parts = [10 * rank + torch.arange(3 * B, dtype=torch.float64).view(3, B).T for rank in range(W)]
    sent = weights(0) + weights(1)
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"]["rows"], torch.cat(parts))
        own = sent[rank * B : (rank + 1) * B]
        torch.testing.assert_close(result["gathered"]["gradient"], own, rtol=0, atol=1e-12)


def test_gathering_leaves_other_gradients_alone(results):
    """What is added to the gathered rows gets its own rank's gradient only, against the weights by hand: 1e-12."""
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["beside"], 2 * weights(rank), rtol=0, atol=1e-12)


def test_gather_all(results):
    """Floats, large integers, more dimensions, and no rows at all on one rank: everyone's rows, bit for bit."""
    expected = [unequal(rank) for rank in range(W)]
    for result in results:
        for kind, parts in enumerate(result["unequal"]):
            assert len(parts) == W
            for rank, part in enumerate(parts):
                assert part.dtype == expected[rank][kind].dtype
                assert torch.equal(part, expected[rank][kind])


def test_what_the_ranks_agree_on(results):
    """The largest of each number, and whether a flag is set on any rank, the same on both: by hand."""
    for result in results:
        assert result["largest"] == [1, 0, 2**40]
        assert result["on_any"] == [0.0, 1.0, 1.0, 1.0]


def test_alone():
    """One process gets its own rows back, with their graph."""
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(rows) is rows
    assert [part is rows for part in gather_all(rows)] == [True]
    assert largest([3, -4]) == [3, -4]
    assert [on_any(torch.tensor(flag)).item() for flag in (False, True)] == [0.0, 1.0]
