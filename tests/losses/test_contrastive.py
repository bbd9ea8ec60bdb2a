"""The contrastive loss against plain Python loops over numbers, in float64.

B  pairs of a rank      N  pairs of the global batch      D  embedding width      W  ranks
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.losses import Pairs
from train_clip.losses.softmax import accuracy, clip_loss, info_nce

N, D = 12, 5


@pytest.fixture
def sides() -> tuple[Tensor, Tensor]:
    """Images and texts, (N, D) float64 of unit norm, a text near its image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, D, dtype=torch.float64, generator=generator)
    texts = images + 0.7 * torch.randn(N, D, dtype=torch.float64, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def naive_info_nce(rows: list[list[float]], columns: list[list[float]], scale: float, offset: int) -> float:
    """-log(exp(s_ii) / Σ_j exp(s_ij)), row by row."""
    total = 0.0
    for i, row in enumerate(rows):
        similarities = [scale * math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns]
        total -= math.log(math.exp(similarities[offset + i]) / math.fsum(math.exp(s) for s in similarities))
    return total / len(rows)


def naive_accuracy(rows: list[list[float]], columns: list[list[float]], offset: int) -> float:
    hits = 0
    for i, row in enumerate(rows):
        products = [math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns]
        hits += products.index(max(products)) == offset + i
    return hits / len(rows)


def shares(images: Tensor, texts: Tensor, size: int) -> list[Pairs]:
    """Each rank's pairs among everyone's."""
    starts = range(0, len(images), size)
    return [Pairs(images[s : s + size], texts[s : s + size], images, texts, s) for s in starts]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("start", "size"), [(0, N), (0, 4), (4, 4), (9, 3), (11, 1)])
def test_info_nce(sides, scale, start, size):
    """Any part of the rows against all columns, at the first, the usual and the largest scale: 1e-12."""
    rows, columns = sides[0][start : start + size], sides[1]
    value = info_nce(rows, columns, torch.tensor(scale, dtype=torch.float64), start)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(naive_info_nce(rows.tolist(), columns.tolist(), scale, start), abs=1e-12)


@pytest.mark.parametrize(("start", "size"), [(0, N), (0, 4), (4, 4), (9, 3)])
def test_accuracy(sides, start, size):
    """Share of rows whose best column is their own, against loops: exact."""
    rows, columns = sides[0][start : start + size], sides[1]
    expected = naive_accuracy(rows.tolist(), columns.tolist(), start)
    assert accuracy(rows, columns, start).item() == pytest.approx(expected, abs=1e-7)


def test_accuracy_is_told_apart(sides):
    """The fixture has hits and misses, and a wrong offset gives another figure."""
    assert 0 < accuracy(*sides).item() < 1
    assert accuracy(sides[0], sides[0]).item() == 1
    assert accuracy(sides[0][3:6], sides[0], 0).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "width"), [(11, 8), (16, 64), (37, 130), (257, 33), (11, 768), (40, 1024)])
def test_accuracy_of_a_collapsed_model(count, width, dtype):
    """All at one point: no row is right, whatever a kernel's rounding picks; where all captions are equal, each is."""
    generator = torch.Generator().manual_seed(1)
    images, texts = F.normalize(torch.randn(2, 1, width, generator=generator), dim=-1).to(dtype).repeat(1, count, 1)
    assert accuracy(images, texts).item() == 0
    assert accuracy(images, texts, 0, torch.zeros(count, dtype=torch.int64)).item() == 1
    # Half of the captions are equal: those rows too are tied with the others.
    assert accuracy(images, texts, 0, torch.arange(count) // 2).item() == 0


def test_accuracy_under_autocast():
    """Similarities that bfloat16 cannot tell apart, in full precision all the same."""
    rows, columns = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.501, 0.5], [0.5, 0.501]])
    with torch.autocast("cpu", torch.bfloat16):
        assert accuracy(rows, columns).item() == 1
        assert accuracy(rows, columns.flip(0)).item() == 0


def test_accuracy_counts_not_a_number_as_wrong(sides):
    """A model that diverged is never right; one row that is NaN is wrong, and its column leaves no other row right."""
    spoiled = sides[0].clone()
    spoiled[3] = torch.nan
    assert accuracy(sides[0] * torch.nan, sides[1]).item() == 0
    assert accuracy(spoiled, sides[0]).item() == pytest.approx((N - 1) / N)
    assert accuracy(sides[0], spoiled).item() == 0


def test_clip_loss(sides):
    """The mean of both directions, against loops: 1e-12. The directions differ."""
    images, texts = sides
    value = clip_loss(Pairs(images, texts, images, texts), torch.tensor(14.3, dtype=torch.float64)).item()
    rows = naive_info_nce(images.tolist(), texts.tolist(), 14.3, 0)
    columns = naive_info_nce(texts.tolist(), images.tolist(), 14.3, 0)
    assert abs(rows - columns) > 1e-3
    assert value == pytest.approx((rows + columns) / 2, abs=1e-12)


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_shards(sides, size):
    """The mean over the ranks' shares is the whole batch's loss: 1e-12."""
    scale = torch.tensor(14.3, dtype=torch.float64)
    losses = [clip_loss(share, scale).item() for share in shares(*sides, size)]
    whole = clip_loss(Pairs(*sides, *sides), scale).item()
    assert math.fsum(losses) / len(losses) == pytest.approx(whole, abs=1e-12)
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_gradient_of_shards(sides, size):
    """The mean over the shares has the whole batch's gradient on both sides and on the temperature: 1e-12."""

    def gradients(size: int) -> list[Tensor]:
        leaves = [side.clone().requires_grad_() for side in sides]
        logit_scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        parts = shares(*leaves, size)
        loss = sum(clip_loss(part, logit_scale.exp()) for part in parts) / len(parts)
        return list(torch.autograd.grad(loss, [*leaves, logit_scale]))

    for sharded, whole in zip(gradients(size), gradients(N), strict=True):
        torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-12)


def test_gradient_of_a_share(sides):
    """One rank's gradient on its rows, on everyone's columns and on the temperature, against finite differences."""
    images, texts = (side.clone().requires_grad_() for side in sides)
    own_images, own_texts = (side[4:8].clone().requires_grad_() for side in sides)
    logit_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def loss(*tensors: Tensor) -> Tensor:
        return clip_loss(Pairs(*tensors[:4], 4), tensors[4].exp())

    assert torch.autograd.gradcheck(loss, (own_images, own_texts, images, texts, logit_scale))


def test_gradient_by_the_formula(sides):
    """∂L/∂S = (softmax of rows + softmax of columns - 2 · identity) / (2 N), entry by entry in loops: 1e-12."""
    images, texts = sides[0].clone().requires_grad_(), sides[1]
    scale = 14.3
    clip_loss(Pairs(images, texts, images, texts), torch.tensor(scale, dtype=torch.float64)).backward()
    exponentials = (scale * sides[0] @ texts.T).exp().tolist()
    of_columns = [math.fsum(column) for column in zip(*exponentials, strict=True)]
    expected = torch.zeros_like(texts)
    for i, row in enumerate(exponentials):
        for j, value in enumerate(row):
            slope = value / math.fsum(row) + value / of_columns[j] - 2 * (i == j)
            expected[i] += slope / (2 * N) * scale * texts[j]
    torch.testing.assert_close(images.grad, expected, rtol=0, atol=1e-12)


def test_equal_captions_are_no_false_negatives():
    """Captions that repeat, against cross-entropy with each target spread evenly over the equal ones: 1e-12.

    The gradients on the images and on each caption are the same, so that equal captions cost nothing.
    """
    torch.manual_seed(0)
    names = torch.tensor([0, 1, 0, 2, 1, 0])
    images = F.normalize(torch.randn(6, D, dtype=torch.float64), dim=-1)
    captions = F.normalize(torch.randn(3, D, dtype=torch.float64), dim=-1)
    even = (names[:, None] == names).double()
    even /= even.sum(dim=1, keepdim=True)

    def gradients(soft: bool) -> tuple[Tensor, ...]:
        leaves = images.clone().requires_grad_(), captions.clone().requires_grad_()
        texts = leaves[1][names]
        if soft:
            similarity = 9.0 * leaves[0] @ texts.T
            loss = (F.cross_entropy(similarity, even) + F.cross_entropy(similarity.T, even)) / 2
        else:
            loss = clip_loss(Pairs(leaves[0], texts, leaves[0], texts), torch.tensor(9.0, dtype=torch.float64))
        return torch.autograd.grad(loss, leaves)

    for hard, spread in zip(gradients(soft=False), gradients(soft=True), strict=True):
        torch.testing.assert_close(hard, spread, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_float32(sides, dtype):
    """Half-precision embeddings give a float32 loss, near float64's."""
    images, texts = (side.to(dtype) for side in sides)
    loss = clip_loss(Pairs(images, texts, images, texts), torch.tensor(5.0, dtype=dtype))
    expected = clip_loss(Pairs(*sides, *sides), torch.tensor(5.0, dtype=torch.float64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=20 * torch.finfo(dtype).eps)


def test_large_similarities_stay_finite():
    """At scale 100 with every pair opposed the loss is 200, not infinite (exp(100) overflows float32)."""
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = clip_loss(Pairs(images, -images, images, -images), torch.tensor(100.0))
    assert loss.item() == pytest.approx(200.0, rel=1e-6)
