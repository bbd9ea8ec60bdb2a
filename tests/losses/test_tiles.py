"""The loss in tiles against the loss on the whole matrix, in float64, and what it holds at a time.

B  pairs of a rank      N  pairs of the global batch      D  embedding width
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from train_clip.losses import Pairs
from train_clip.losses import softmax as contrastive
from train_clip.losses import tiles as module_of_tiles
from train_clip.losses.softmax import accuracy, clip_loss, softmax_tile
from train_clip.losses.tiles import tiled_loss

N, D = 13, 5
GROUPS = torch.tensor([0, 1, 2, 0, 3, 4, 4, 4, 5, 6, 0, 7, 8])


@pytest.fixture(params=[1, 3, 5, 13, 99])
def rows_at_a_time(request, monkeypatch) -> int:
    """Tiles of so many rows of all N columns."""
    monkeypatch.setattr(module_of_tiles, "TILE", request.param * N + 1)
    return request.param


def sides(start: int = 0, stop: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Some rows of the one side, all of the other; of unit norm, a row near its column."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(N, D, dtype=torch.float64, generator=generator)
    rows = columns + 0.7 * torch.randn(N, D, dtype=torch.float64, generator=generator)
    rows, columns = F.normalize(rows, dim=1)[start:stop], F.normalize(columns, dim=1)
    return rows.to(dtype).clone().requires_grad_(), columns.to(dtype).clone().requires_grad_()


def tiled_info_nce(
    rows: Tensor, columns: Tensor, scale: Tensor, offset: int = 0, groups: Tensor | None = None
) -> Tensor:
    return tiled_loss(softmax_tile, (rows, columns, scale, None), offset, groups)


def plain(rows: Tensor, columns: Tensor, scale: Tensor, offset: int, groups: Tensor | None) -> Tensor:
    """The whole matrix at once; equal columns but the own one are taken out."""
    similarity = scale * rows @ columns.T
    own = torch.arange(offset, offset + len(rows))
    for row, place in enumerate(own.tolist()):
        for column in range(N if groups is not None else 0):
            if column != place and groups[column] == groups[place]:
                mask = torch.zeros_like(similarity, dtype=torch.bool)
                mask[row, column] = True
                similarity = similarity.masked_fill(mask, -torch.inf)
    return F.cross_entropy(similarity, own)


@pytest.mark.parametrize("value", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("start", "stop"), [(0, N), (4, 9), (12, 13)])
@pytest.mark.parametrize("groups", [None, GROUPS, torch.zeros(N, dtype=torch.int64)])
def test_loss_and_gradient(rows_at_a_time, value, start, stop, groups):
    """Of rows, columns and scale, for a share of the rows, equal captions in or out: 1e-12."""
    found, expected = sides(start, stop), sides(start, stop)
    scales = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = tiled_info_nce(*found, scales[0], start, groups)
    other = plain(*expected, scales[1], start, groups)
    assert loss.item() == pytest.approx(other.item(), abs=1e-12)
    (3 * loss).backward()
    (3 * other).backward()
    for own, its in zip((*found, scales[0]), (*expected, scales[1]), strict=True):
        torch.testing.assert_close(own.grad, its.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, N])
@pytest.mark.parametrize("mask", [False, True])
def test_shares_of_both_directions(rows_at_a_time, size, mask, monkeypatch):
    """``clip_loss`` of all ranks' shares, in tiles and not, gradients at everyone's embeddings: 1e-12."""
    scale = torch.tensor(20.0, dtype=torch.float64)

    def of_all(tile: int) -> tuple[float, list[Tensor]]:
        monkeypatch.setattr(contrastive, "TILE", tile)
        images, texts = sides()
        starts = range(0, N - N % size, size)
        shares = [Pairs(images[s : s + size], texts[s : s + size], images, texts, s, GROUPS) for s in starts]
        losses = [clip_loss(share, scale, mask_equal=mask) for share in shares]
        torch.stack(losses).mean().backward()
        return torch.stack(losses).mean().item(), [images.grad, texts.grad]

    (loss, gradients), (expected, others) = of_all(0), of_all(10**9)
    assert loss == pytest.approx(expected, abs=1e-12)
    for own, its in zip(gradients, others, strict=True):
        torch.testing.assert_close(own, its, rtol=0, atol=1e-12)


def test_which_parts_have_a_gradient(rows_at_a_time):
    """A side that is fixed gets none, and without any the loss has no graph."""
    rows, columns = sides()
    scale = torch.tensor(5.0, dtype=torch.float64)
    loss = tiled_info_nce(rows, columns.detach(), scale)
    loss.backward()
    assert rows.grad is not None and scale.grad is None and columns.grad is None
    with torch.no_grad():
        without = tiled_info_nce(rows, columns, scale)
    assert without.item() == loss.item()
    assert not without.requires_grad and not tiled_info_nce(rows.detach(), columns.detach(), scale).requires_grad


def test_a_second_backward_pass_gives_the_same(rows_at_a_time):
    """What was kept is not used up; the gradient itself has no graph to be differentiated again."""
    rows, columns = sides()
    loss = tiled_info_nce(rows, columns, torch.tensor(5.0, dtype=torch.float64))
    first, second = (torch.autograd.grad(loss, rows, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    assert not gradient.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_other_types(rows_at_a_time, dtype):
    """The loss is float32, each gradient of its tensor's type, and finite at the largest scale."""
    rows, columns = sides(dtype=dtype)
    scale = torch.tensor(100.0, requires_grad=True)
    loss = tiled_info_nce(rows, columns, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (rows.grad.dtype, columns.grad.dtype, scale.grad.dtype) == (dtype, dtype, torch.float32)
    wide = [side.detach().double().requires_grad_() for side in (rows, columns)]
    plain(*wide, torch.tensor(100.0, dtype=torch.float64), 0, None).backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(rows.grad.double(), wide[0].grad, rtol=0, atol=tolerance * wide[0].grad.abs().max())


def test_under_autocast(rows_at_a_time):
    """In full precision all the same."""
    rows, columns = sides(dtype=torch.float32)
    scale = torch.tensor(50.0)
    expected = tiled_info_nce(rows, columns, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiled_info_nce(rows, columns, scale), expected)


def test_accuracy(rows_at_a_time):
    """Counted in tiles as over the whole matrix, for a share of the rows."""
    rows, columns = sides(2, 11)
    expected = ((rows @ columns.T).argmax(dim=1) == torch.arange(2, 11)).double().mean()
    assert accuracy(rows, columns, 2).item() == pytest.approx(expected.item())


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Numbers of the largest tensor that is made within the block."""
    found = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    found[0] = max(found[0], tensor.numel())
            return result

    with Watch():
        yield found


@pytest.mark.parametrize("mask", [False, True])
def test_no_matrix_of_all_pairs_is_made(mask, monkeypatch):
    """Forward and backward pass of 512 pairs, equal captions masked or not: nothing larger than a tile or a side."""
    for module in (contrastive, module_of_tiles):
        monkeypatch.setattr(module, "TILE", 4096)
    images, texts = (torch.randn(512, 4).requires_grad_() for _ in range(2))
    with largest_tensor() as found:
        pairs = Pairs(images, texts, images, texts, 0, torch.arange(512) // 2)
        clip_loss(pairs, torch.tensor(9.0), mask_equal=mask).backward()
        accuracy(images, texts)
    assert found[0] == 4096
