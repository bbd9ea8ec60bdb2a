"""The sigmoid loss against plain Python loops over numbers, in float64, gradients included.

B  pairs of a rank      N  pairs of the global batch      D  embedding width
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.losses.test_tiles import largest_tensor
from train_clip.losses import Pairs
from train_clip.losses import tiles as module_of_tiles
from train_clip.losses.sigmoid import sigmoid_floor, sigmoid_loss
from train_clip.losses.softmax import clip_loss

N, D = 11, 5
NAMES = [3, 1, 3, 7, 2**62, 1, 3, -5, 3, 0, 9]
SHARES = [(0, N), (0, 4), (4, 5), (10, 1)]


@pytest.fixture(params=[1, 3, 4, 99])
def rows_at_a_time(request, monkeypatch) -> int:
    """Tiles of so many rows of all N columns."""
    monkeypatch.setattr(module_of_tiles, "TILE", request.param * N + 1)
    return request.param


def sides(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and texts, (N, D) of unit norm, a text near its image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, D, dtype=torch.float64, generator=generator)
    texts = images + 0.7 * torch.randn(N, D, dtype=torch.float64, generator=generator)
    return F.normalize(images, dim=-1).to(dtype), F.normalize(texts, dim=-1).to(dtype)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


class Naive:
    """-1/B Σ_i Σ_j ln σ(z_ij (t x_i·y_j + b)) and its derivatives, number by number.

    With ∂/∂s of -ln σ(z s) = -z σ(-z s) = σ(s) - [z = 1].
    """

    def __init__(self, start: int, size: int, scale: float, bias: float, names: list[int] | None) -> None:
        images, texts = (side.tolist() for side in sides())
        self.loss = self.of_scale = self.of_bias = 0.0
        self.of_rows = [[0.0] * D for _ in range(size)]
        self.of_columns = [[0.0] * D for _ in range(N)]
        for i in range(start, start + size):
            for j in range(N):
                if names is not None and i != j and names[i] == names[j]:
                    continue
                product = math.fsum(a * b for a, b in zip(images[i], texts[j], strict=True))
                logit = scale * product + bias
                self.loss += math.log1p(math.exp(-logit if i == j else logit)) / size
                slope = (1 / (1 + math.exp(-logit)) - (i == j)) / size
                self.of_scale += slope * product
                self.of_bias += slope
                for k in range(D):
                    self.of_rows[i - start][k] += slope * scale * texts[j][k]
                    self.of_columns[j][k] += slope * scale * images[i][k]


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.5), (100.0, -30.0)])
@pytest.mark.parametrize(("start", "size"), SHARES)
@pytest.mark.parametrize("names", [None, NAMES, [4] * N], ids=["all", "equal left out", "all equal"])
def test_loss_and_gradient(rows_at_a_time, scale, bias, start, size, names):
    """Of rows, columns, scale and bias, for any share of the rows and any tile: 1e-12."""
    images, texts = (side.clone().requires_grad_() for side in sides())
    rows = images[start : start + size].detach().requires_grad_()
    t, b = number(scale), number(bias)
    captions = None if names is None else torch.tensor(names)
    # Of the other direction nothing is asked.
    unused = torch.full((N, D), math.nan, dtype=torch.float64)
    loss = sigmoid_loss(Pairs(rows, unused[:size], unused, texts, start, captions), t, b, names is not None)
    assert loss.shape == () and loss.dtype == torch.float64
    (3 * loss).backward()
    naive = Naive(start, size, scale, bias, names)
    assert loss.item() == pytest.approx(naive.loss, abs=1e-12, rel=1e-13)
    for own, expected in (
        (rows.grad, naive.of_rows),
        (texts.grad, naive.of_columns),
        (t.grad, naive.of_scale),
        (b.grad, naive.of_bias),
    ):
        torch.testing.assert_close(own, 3 * torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares(size):
    """The mean over the ranks' shares is the whole batch's, in loss and in every gradient: 1e-12. Shares differ."""

    def of(size: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        images, texts = (side[:8].clone().requires_grad_() for side in sides())
        t, b = number(10.0), number(-5.0)
        losses = [
            sigmoid_loss(Pairs(images[s : s + size], texts[s : s + size], images, texts, s), t, b)
            for s in range(0, 8, size)
        ]
        mean = torch.stack(losses).mean()
        return losses, (mean.detach(), *torch.autograd.grad(mean, (images, texts, t, b)))

    losses, shared = of(size)
    assert max(losses) - min(losses) > 1e-3
    for one, other in zip(shared, of(8)[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_it_is_the_papers_algorithm():
    """Algorithm 1 of the paper, word for word: -sum(log_sigmoid(labels * logits)) / n."""
    images, texts = sides()
    labels = 2 * torch.eye(N) - torch.ones(N, N)
    logits = images @ texts.T * math.exp(2.0) + -7.0
    expected = -F.logsigmoid(labels * logits).sum() / N
    found = sigmoid_loss(Pairs(images, texts, images, texts), number(2.0).exp(), number(-7.0))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_which_parts_have_a_gradient():
    """A side that is fixed gets none; without any the loss has no graph, and the same value."""
    images, texts = sides()
    images.requires_grad_()
    t, b = torch.tensor(5.0), torch.tensor(-3.0)
    loss = sigmoid_loss(Pairs(images, texts, images, texts), t, b)
    loss.backward()
    assert images.grad is not None and texts.grad is None and t.grad is None
    with torch.no_grad():
        without = sigmoid_loss(Pairs(images, texts, images, texts), t, b)
    assert without.item() == loss.item() and not without.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_float32(dtype):
    """Of half-precision embeddings too, under autocast too; gradients are of their tensor's type."""
    images, texts = (side.requires_grad_() for side in sides(dtype))
    t, b = (torch.tensor(value, requires_grad=True) for value in (50.0, -20.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(Pairs(images, texts, images, texts), t, b)
    loss.backward()
    wide = [side.detach().double() for side in (images, texts)]
    expected = sigmoid_loss(Pairs(*wide, *wide), number(50.0), number(-20.0)).item()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (images.grad.dtype, t.grad.dtype, b.grad.dtype) == (dtype, torch.float32, torch.float32)


def test_small_shares_are_not_lost():
    """At bias -30 each wrong pair pushes by 1e-13, and the right ones by almost 1: both in float32, relative 1e-4."""
    one = torch.zeros(2, 2, requires_grad=True)
    other = torch.eye(2)
    sigmoid_loss(Pairs(one, one, one, other), torch.tensor(1.0), torch.tensor(-30.0)).backward()
    wrong, right = 1 / (1 + math.exp(30)) / 2, -1 / (1 + math.exp(-30)) / 2
    torch.testing.assert_close(one.grad, torch.tensor([[right, wrong], [wrong, right]]), rtol=1e-4, atol=0)


def test_large_logits_stay_finite():
    """Scale 100 and every pair opposed: 100 each, not infinite."""
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = sigmoid_loss(Pairs(images, -images, images, -images), torch.tensor(100.0), torch.tensor(0.0))
    assert loss.item() == pytest.approx(200.0, rel=1e-6)


@pytest.mark.parametrize("mask", [False, True])
def test_no_matrix_of_all_pairs_is_made(mask, monkeypatch):
    """Forward and backward pass of 512 pairs: nothing larger than a tile."""
    monkeypatch.setattr(module_of_tiles, "TILE", 4096)
    images, texts = (torch.randn(512, 4).requires_grad_() for _ in range(2))
    with largest_tensor() as found:
        pairs = Pairs(images, texts, images, texts, 0, torch.arange(512) // 2)
        sigmoid_loss(pairs, torch.tensor(9.0), torch.tensor(-9.0), mask).backward()
    assert found[0] == 4096


@pytest.mark.parametrize("names", [NAMES, [0] * 6, [1, 2, 3], [5], [2, 2, 1, 1]])
def test_floor(names):
    """The least of -ln σ(s) - (n - 1) ln σ(-s), found by trying a million logits, and no loss is below it."""
    tried = torch.linspace(-30, 40, 1_000_001, dtype=torch.float64)
    expected = 0.0
    for name in names:
        least = (-F.logsigmoid(tried) - (names.count(name) - 1) * F.logsigmoid(-tried)).min().item()
        expected += least / len(names)
    assert sigmoid_floor(torch.tensor(names)).item() == pytest.approx(expected, abs=1e-6)
    torch.manual_seed(0)
    _, place = torch.unique(torch.tensor(names), return_inverse=True)
    for scale, bias in ((20.0, -10.0), (60.0, -58.0), (5.0, 0.0)):
        perfect = torch.eye(int(place.max()) + 1, dtype=torch.float64)[place]
        loss = sigmoid_loss(Pairs(perfect, perfect, perfect, perfect), number(scale), number(bias))
        assert loss.item() > expected - 1e-9


def test_equal_captions_do_count_as_wrong():
    """Unlike with the softmax: a caption that two images share, near both, is pushed away by each, unless masked."""
    images = torch.eye(2, dtype=torch.float64)
    towards = torch.tensor([1.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    shared = towards.clone().requires_grad_()
    pairs = Pairs(images, shared.expand(2, 2), images, shared.expand(2, 2), 0, torch.tensor([8, 8]))
    kept, masked, softmax = (
        torch.autograd.grad(loss, shared)[0] @ towards
        for loss in (
            sigmoid_loss(pairs, number(10.0), number(0.0)),
            sigmoid_loss(pairs, number(10.0), number(0.0), mask_equal=True),
            clip_loss(pairs, number(10.0)),
        )
    )
    assert kept > 1 and masked < 0
    assert softmax == pytest.approx(0, abs=1e-12)
