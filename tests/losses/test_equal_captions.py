"""Captions that repeat within a batch: loss, floor and accuracy against plain loops, and what they do to a gradient.

B  pairs of a rank      N  pairs of the global batch      D  embedding width
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_clip.losses import Pairs
from train_clip.losses.softmax import accuracy, clip_loss, info_nce, loss_floor

N, D = 10, 5
SCALE = 7.0
# Numbers of the captions: one of four pairs, one of two, one of each other; equal ones stand on different ranks.
NAMES = [3, 1, 3, 7, 2**62, 1, 3, -5, 3, 0]
SHARES = [(0, N), (0, 5), (5, 5), (4, 2), (9, 1)]


@pytest.fixture
def sides() -> tuple[Tensor, Tensor]:
    """Images and texts, (N, D) float64 of unit norm; the texts of equal captions differ, as under dropout."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, N, D, dtype=torch.float64, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(images + 0.8 * texts, dim=-1)


def products(rows: Tensor, columns: Tensor, scale: float = 1.0) -> list[list[float]]:
    """Every row with every column, number by number."""
    return [
        [scale * math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns.tolist()]
        for row in rows.tolist()
    ]


def naive(rows: Tensor, columns: Tensor, scale: float, start: int, names: list[int]) -> float:
    """-log(exp(s_ii) / Σ exp(s_ij)), the sum over the own pair and those of other captions."""
    total = 0.0
    for i, row in enumerate(products(rows, columns, scale)):
        own = start + i
        stay = [value for j, value in enumerate(row) if j == own or names[j] != names[own]]
        total -= math.log(math.exp(row[own]) / math.fsum(map(math.exp, stay)))
    return total / len(rows)


@pytest.mark.parametrize(("start", "size"), SHARES)
@pytest.mark.parametrize("direction", ["images", "texts"])
def test_info_nce_leaves_equal_captions_out(sides, direction, start, size):
    """Against loops, in float64, rows of any rank: 1e-12. It is not the loss without groups where one repeats."""
    rows, columns = sides if direction == "images" else sides[::-1]
    rows, names = rows[start : start + size], torch.tensor(NAMES)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    value = info_nce(rows, columns, scale, start, names).item()
    assert value == pytest.approx(naive(rows, columns, SCALE, start, NAMES), abs=1e-12)
    repeats = any(NAMES.count(NAMES[place]) > 1 for place in range(start, start + size))
    assert (abs(value - info_nce(rows, columns, scale, start).item()) > 1e-4) == repeats


def test_gradient_of_what_stays(sides):
    """∂L/∂S_ij = (softmax over what stays - own) / B, in loops, and 0 for what was left out: 1e-12."""
    start, size = 2, 5
    rows, columns = sides[0][start : start + size].clone().requires_grad_(), sides[1].clone().requires_grad_()
    info_nce(rows, columns, torch.tensor(SCALE, dtype=torch.float64), start, torch.tensor(NAMES)).backward()
    of_rows, of_columns = torch.zeros_like(sides[0][:size]), torch.zeros_like(sides[1])
    for i, row in enumerate(products(sides[0][start : start + size], sides[1], SCALE)):
        own = start + i
        stay = {j: math.exp(value) for j, value in enumerate(row) if j == own or NAMES[j] != NAMES[own]}
        for j, value in stay.items():
            slope = (value / math.fsum(stay.values()) - (j == own)) / size * SCALE
            of_rows[i] += slope * sides[1][j]
            of_columns[j] += slope * sides[0][own]
    torch.testing.assert_close(rows.grad, of_rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(columns.grad, of_columns, rtol=0, atol=1e-12)


def test_gradient_by_finite_differences(sides):
    """``clip_loss`` with the mask, of one rank's rows, everyone's columns and the temperature."""
    leaves = [side[4:7].clone().requires_grad_() for side in sides] + [side.clone().requires_grad_() for side in sides]
    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)

    def loss(*tensors: Tensor) -> Tensor:
        return clip_loss(Pairs(*tensors[:4], 4, torch.tensor(NAMES)), tensors[4].exp(), mask_equal=True)

    assert torch.autograd.gradcheck(loss, (*leaves, scale))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shares_with_the_mask(sides, size):
    """The mean over the ranks' shares is the whole batch's masked loss, both directions: against loops, 1e-12."""
    scale, names = torch.tensor(SCALE, dtype=torch.float64), torch.tensor(NAMES)
    shares = [Pairs(*(side[s : s + size] for side in sides), *sides, s, names) for s in range(0, N, size)]
    losses = [clip_loss(share, scale, mask_equal=True).item() for share in shares]
    both = naive(*sides, SCALE, 0, NAMES) + naive(*sides[::-1], SCALE, 0, NAMES)
    assert math.fsum(losses) / len(losses) == pytest.approx(both / 2, abs=1e-12)


def test_the_mask_is_asked_for(sides):
    """Captions that are only known change nothing; captions that all differ give the plain loss, masked or not."""
    scale = torch.tensor(SCALE, dtype=torch.float64)
    plain = clip_loss(Pairs(*sides, *sides), scale)
    assert torch.equal(clip_loss(Pairs(*sides, *sides, 0, torch.tensor(NAMES)), scale), plain)
    assert torch.equal(clip_loss(Pairs(*sides, *sides, 0, torch.arange(N)), scale, mask_equal=True), plain)


def test_all_captions_equal(sides):
    """Nothing is left to be told from: 0 with the mask, and with finite gradients, at the largest scale too."""
    for scale in (1.0, 100.0):
        leaves = [side.clone().requires_grad_() for side in sides]
        pairs = Pairs(*leaves, *leaves, 0, torch.full((N,), 4))
        loss = clip_loss(pairs, torch.tensor(scale, dtype=torch.float64), mask_equal=True)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, leaves):
            assert (gradient == 0).all()


@pytest.mark.parametrize("names", [NAMES, [0] * 6, [1, 2, 3], [5], [2, 2, 1, 1]])
def test_loss_floor(names):
    """Mean of ln n_i, counted in a loop: to float32's rounding."""
    expected = math.fsum(math.log(names.count(name)) for name in names) / len(names)
    assert loss_floor(torch.tensor(names)).item() == pytest.approx(expected, abs=1e-6)


def test_a_perfect_model_reaches_the_floor_and_no_less():
    """Orthogonal embeddings, one for each caption: the loss is above the floor at every scale, and nears it, 1e-12."""
    _, place = torch.unique(torch.tensor(NAMES), return_inverse=True)
    perfect = torch.eye(int(place.max()) + 1, dtype=torch.float64)[place]
    floor = math.fsum(math.log(NAMES.count(name)) for name in NAMES) / N
    pairs = Pairs(perfect, perfect, perfect, perfect, 0, torch.tensor(NAMES))
    losses = [clip_loss(pairs, torch.tensor(scale, dtype=torch.float64)).item() for scale in (1.0, 10.0, 25.0, 50.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] - floor == pytest.approx(0, abs=1e-12)
    assert min(losses) >= floor - 1e-12
    assert loss_floor(torch.tensor(NAMES)).item() == pytest.approx(floor, abs=1e-6)
    # Other embeddings stay above it: even the mean over many.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        images = F.normalize(torch.randn(N, D, dtype=torch.float64, generator=generator), dim=-1)
        texts = F.normalize(torch.randn(len(perfect), D, dtype=torch.float64, generator=generator), dim=-1)[place]
        scale = torch.tensor(100.0, dtype=torch.float64)
        assert clip_loss(Pairs(images, texts, images, texts), scale).item() > floor


@pytest.mark.parametrize(("start", "size"), SHARES)
def test_accuracy_counts_equal_captions_as_right(sides, start, size):
    """Against loops: a row is right where its best column has its own caption."""
    hits = []
    for names in (NAMES, list(range(N))):
        found = [row.index(max(row)) for row in products(sides[0][start : start + size], sides[1])]
        hits.append(sum(names[best] == names[start + i] for i, best in enumerate(found)) / size)
        value = accuracy(sides[0][start : start + size], sides[1], start, torch.tensor(names)).item()
        assert value == pytest.approx(hits[-1], abs=1e-7)
    assert accuracy(sides[0][start : start + size], sides[1], start).item() == pytest.approx(hits[1], abs=1e-7)


def test_accuracy_tells_the_two_apart():
    """The best column is another pair of the same caption: right with groups, wrong without."""
    images = torch.eye(3)
    texts = images[[1, 0, 2]]
    assert accuracy(images, texts, 0, torch.tensor([8, 8, 9])).item() == 1
    assert accuracy(images, texts).item() == pytest.approx(1 / 3)


class Towers(nn.Module):
    """Two linear towers over different images and over captions that repeat, and a temperature; in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, D).double(), nn.Linear(6, D).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        _, place = torch.unique(torch.tensor(NAMES), return_inverse=True)
        self.inputs = torch.randn(N, 7, dtype=torch.float64), torch.randn(N, 6, dtype=torch.float64)[place]

    def forward(self) -> tuple[Tensor, Tensor]:
        images, texts = self.image(self.inputs[0]), self.text(self.inputs[1])
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*self.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def test_equal_captions_cost_nothing():
    """One target in each row, against targets spread evenly over the equal captions: loss and gradients to 1e-12.

    The theorem: where equal captions have equal embeddings, the batch's loss and every parameter's gradient are the
    same. Leaving equal captions out of the denominators is another loss with another gradient, and each embedding's
    own gradient is another.
    """
    towers = Towers()
    images, texts = towers()
    scale = towers.logit_scale.exp()
    one_hot = clip_loss(Pairs(images, texts, images, texts), scale)
    names = torch.tensor(NAMES)
    even = (names[:, None] == names).double()
    even /= even.sum(dim=1, keepdim=True)
    similarity = scale * images @ texts.T
    spread = (F.cross_entropy(similarity, even) + F.cross_entropy(similarity.T, even)) / 2
    masked = clip_loss(Pairs(images, texts, images, texts, 0, names), scale, mask_equal=True)
    assert one_hot.item() == pytest.approx(spread.item(), abs=1e-12)
    assert masked.item() < one_hot.item() - 0.1
    of_texts = [torch.autograd.grad(loss, texts, retain_graph=True)[0] for loss in (one_hot, spread)]
    assert (of_texts[0] - of_texts[1]).abs().max() > 1e-3
    found, expected, other = (towers.gradients(loss) for loss in (one_hot, spread, masked))
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert (gradient - other[name]).abs().max() > 1e-4, name
