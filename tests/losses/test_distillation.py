"""Targets of a teacher and the divergence from them, against plain Python loops over numbers, in float64.

B  pairs of a rank      N  pairs of the global batch      D  embedding width
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.losses.distillation import Targets, divergence, softmax_targets, transport_targets

N, D = 9, 6
BOTH = [transport_targets, softmax_targets]
both_kinds = pytest.mark.parametrize("make", BOTH, ids=["transport", "softmax"])
Matrix = list[list[float]]


@pytest.fixture
def sides() -> tuple[Tensor, Tensor]:
    """Images and texts of a teacher, (N, D) float64 of unit norm."""
    return embeddings(N, 0)


def embeddings(number: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, noise = torch.randn(2, number, D, dtype=torch.float64, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(images + 0.9 * noise, dim=-1)


def cosines(rows: Tensor, columns: Tensor) -> Matrix:
    return [
        [math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns.tolist()]
        for row in rows.tolist()
    ]


def summed(images: Tensor, texts: Tensor) -> tuple[Matrix, Matrix]:
    """S_vv + S_tt + S_vt and S_vv + S_tt + S_tv, 100 taken from S_vv and from S_tt where a pair meets itself."""
    vv, tt, vt, tv = cosines(images, images), cosines(texts, texts), cosines(images, texts), cosines(texts, images)
    places = range(len(vv))
    for i in places:
        vv[i][i] -= 100
        tt[i][i] -= 100
    return tuple([[vv[i][j] + tt[i][j] + across[i][j] for j in places] for i in places] for across in (vt, tv))  # type: ignore[return-value]


def sinkhorn(similarity: Matrix) -> Matrix:
    """exp(S / 0.15), its rows and then its columns divided by their sums, five times; then its rows once more."""
    mass = [[math.exp(value / 0.15) for value in row] for row in similarity]
    places = range(len(mass))
    for _ in range(5):
        for i in places:
            total = math.fsum(mass[i])
            mass[i] = [value / total for value in mass[i]]
        for j in places:
            total = math.fsum(mass[i][j] for i in places)
            for i in places:
                mass[i][j] /= total
    return [[value / math.fsum(row) for value in row] for row in mass]


def softmax(similarity: Matrix) -> Matrix:
    """exp(100 S) over its sum, the row's largest taken off first: exp(300) is as much as a double holds."""
    rows = [[math.exp(100 * (value - max(row))) for value in row] for row in similarity]
    return [[value / math.fsum(row) for value in row] for row in rows]


def naive_targets(make: Callable[..., Targets], images: Tensor, texts: Tensor) -> list[Tensor]:
    spread = sinkhorn if make is transport_targets else softmax
    return [torch.tensor(spread(matrix), dtype=torch.float64) for matrix in summed(images, texts)]


@both_kinds
@pytest.mark.parametrize("number", [2, 3, N, 23])
def test_targets(make, number):
    """Both directions against loops with plain exponentials: 1e-12. The directions differ."""
    sides = embeddings(number, number)
    found, expected = make(*sides), naive_targets(make, *sides)
    for log_target, target in zip(found, expected, strict=True):
        assert log_target.dtype == torch.float64
        torch.testing.assert_close(log_target.exp(), target, rtol=0, atol=1e-12)
    if number > 2:
        assert (found.image_to_text.exp() - found.text_to_image.exp()).abs().max() > 1e-3


@both_kinds
def test_rows_are_distributions_over_the_other_pairs(make, sides):
    """Each row sums to 1 (1e-12), and nothing of it falls on the own pair."""
    for log_target in make(*sides):
        target = log_target.exp()
        torch.testing.assert_close(target.sum(dim=1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (target.diagonal() == 0).all()
        assert (target.fill_diagonal_(1) > 0).all() or make is softmax_targets


def test_transport_evens_out_columns(sides):
    """OTTER's point: columns get sums nearer to 1 than softmax of the same similarities over the same 0.15 gives."""
    for log_target, matrix in zip(transport_targets(*sides), summed(*sides), strict=True):
        plain = (torch.tensor(matrix, dtype=torch.float64) / 0.15).softmax(dim=1)
        off, off_plain = ((target.sum(dim=0) - 1).abs().max() for target in (log_target.exp(), plain))
        assert off < off_plain / 3


@both_kinds
def test_high_similarity_gets_high_mass(make):
    """Pairs on a circle, each nearer to its neighbours than to any other: a row's mass falls with the distance."""
    angles = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    for log_target in make(points, points):
        for row in range(8):
            by_distance = [log_target[row, (row + step) % 8].item() for step in (1, 2, 3, 4)]
            assert by_distance == sorted(by_distance, reverse=True)
            assert by_distance[0] - by_distance[3] > 1
            assert log_target[row, (row + 1) % 8].item() == pytest.approx(log_target[row, row - 1].item(), abs=1e-9)


@both_kinds
def test_a_pair_like_another_gets_its_mass(make, sides):
    """Two pairs made equal: each gives the other more than all the rest."""
    images, texts = (side.clone() for side in sides)
    images[5], texts[5] = images[2], texts[2]
    for log_target in make(images, texts):
        assert log_target[2].exp()[5] > 0.5
        assert log_target[5].exp()[2] > 0.5


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_pairs_equal(make, dtype):
    """No pair is like another more than the rest: the mass is even over the N - 1 others, by symmetry."""
    same = F.normalize(torch.ones(N, D, dtype=dtype), dim=-1)
    for log_target in make(same, same):
        expected = (1 - torch.eye(N, dtype=dtype)) / (N - 1)
        torch.testing.assert_close(log_target.exp(), expected, rtol=0, atol=1e-5)


@both_kinds
def test_two_pairs_and_one(make):
    """Of two pairs each gets all of the other's mass. One pair has only itself; all stays finite."""
    images, texts = embeddings(2, 0)
    for log_target in make(images, texts):
        assert torch.equal(log_target.exp(), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    for log_target in make(images[:1], texts[:1]):
        assert log_target.tolist() == [[0.0]]


@both_kinds
@pytest.mark.parametrize("factor", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_any_similarity(make, dtype, factor):
    """Embeddings of no unit norm, similarities up to 90,000 and exactly 0: finite rows that sum to 1, in float32."""
    images, texts = ((factor * side).to(dtype) for side in embeddings(N, 3))
    for log_target in make(images, texts):
        assert log_target.dtype == torch.float32
        assert log_target.isfinite().all()
        torch.testing.assert_close(log_target.exp().sum(dim=1), torch.ones(N), rtol=0, atol=1e-5)


@both_kinds
def test_half_precision_is_widened_first(make, sides):
    """Of bfloat16 embeddings the same as of those numbers in float32, not as of products rounded to bfloat16."""
    halves = [side.bfloat16() for side in sides]
    for found, expected in zip(make(*halves), make(*(half.float() for half in halves)), strict=True):
        assert torch.equal(found, expected)


@both_kinds
def test_a_teacher_gets_no_gradient_and_keeps_its_numbers(make, sides):
    """Inputs that ask for a gradient give targets that have none; they are not written to, and calls agree."""
    images, texts = (side.clone().requires_grad_() for side in sides)
    first = make(images, texts)
    assert not first.image_to_text.requires_grad and not first.text_to_image.requires_grad
    assert torch.equal(images, sides[0]) and torch.equal(texts, sides[1])
    for one, two in zip(first, make(images, texts), strict=True):
        assert torch.equal(one, two)
    assert len({target.data_ptr() for target in first}) == 2


@both_kinds
@pytest.mark.parametrize("offset", [0, 3, 6])
def test_divergence(make, sides, offset):
    """Of one rank's rows at several scales, against loops and against ``torch.distributions``: 1e-12."""
    images, texts = sides
    rows, columns = embeddings(N, 8)
    rows = rows[offset : offset + 3]
    log_target = make(images, texts).image_to_text[offset : offset + 3]
    for scale in (1.0, 14.0, 49.4):
        before = log_target.clone()
        value = divergence(rows, columns, torch.tensor(scale, dtype=torch.float64), log_target).item()
        assert torch.equal(log_target, before)
        expected = 0.0
        for row, target in zip(cosines(rows, columns), log_target.exp().tolist(), strict=True):
            total = math.fsum(math.exp(scale * cosine) for cosine in row)
            for cosine, q in zip(row, target, strict=True):
                expected += q * (math.log(q) - math.log(math.exp(scale * cosine) / total)) if q else 0.0
        assert value == pytest.approx(expected / 3, abs=1e-12)
        student = torch.distributions.Categorical(logits=scale * rows @ columns.T)
        teacher = torch.distributions.Categorical(logits=log_target)
        # Its kl_divergence is infinite where a probability is clamped, so by cross-entropy and entropy.
        mass = log_target.exp()
        cross = -(mass * student.logits).sum(dim=1)
        assert value == pytest.approx((cross - teacher.entropy()).mean().item(), abs=1e-9)
        assert value > 0


def test_divergence_by_finite_differences(sides):
    """Gradients of rows, columns and scale; none goes to the target."""
    rows, columns = (side.clone().requires_grad_() for side in embeddings(N, 8))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    log_target = transport_targets(*sides).image_to_text[2:6]

    def loss(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        return divergence(rows, columns, scale.exp(), log_target)

    assert torch.autograd.gradcheck(loss, (rows[2:6].detach().requires_grad_(), columns, scale))


def test_gradient_by_the_formula(sides):
    """∂L/∂S = (P - Q) / B at the similarities, entry by entry: a student that gives too little is pulled up. 1e-12."""
    rows, columns = embeddings(N, 8)
    rows.requires_grad_()
    log_target = transport_targets(*sides).image_to_text
    divergence(rows, columns, torch.tensor(5.0, dtype=torch.float64), log_target).backward()
    expected = torch.zeros_like(columns)
    for i, (row, target) in enumerate(zip(cosines(rows.detach(), columns), log_target.exp().tolist(), strict=True)):
        total = math.fsum(math.exp(5.0 * cosine) for cosine in row)
        for j, (cosine, q) in enumerate(zip(row, target, strict=True)):
            expected[i] += (math.exp(5.0 * cosine) / total - q) / N * 5.0 * columns[j]
    torch.testing.assert_close(rows.grad, expected, rtol=0, atol=1e-12)


def test_a_student_at_its_target_has_no_divergence(sides):
    """The target is the student's own distribution: 0, and a gradient of 0, to 1e-12; any other is above 0."""
    rows, columns = (side.clone().requires_grad_() for side in sides)
    scale = torch.tensor(20.0, dtype=torch.float64)
    own = (scale * rows @ columns.T).log_softmax(dim=1).detach()
    loss = divergence(rows, columns, scale, own)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    for gradient in torch.autograd.grad(loss, (rows, columns)):
        assert gradient.abs().max() < 1e-12
    for seed in range(20):
        assert divergence(*embeddings(N, seed + 50), scale, own).item() > 0


@both_kinds
def test_shares(make, sides):
    """The mean over the ranks' rows is the whole batch's divergence, with its gradient on the columns: 1e-12."""
    rows, columns = embeddings(N, 8)
    columns.requires_grad_()
    scale, log_target = torch.tensor(9.0, dtype=torch.float64), make(*sides).text_to_image
    parts = [divergence(rows[s : s + 3], columns, scale, log_target[s : s + 3]) for s in (0, 3, 6)]
    whole = divergence(rows, columns, scale, log_target)
    assert (sum(parts) / 3).item() == pytest.approx(whole.item(), abs=1e-12)
    found, expected = (torch.autograd.grad(loss, columns, retain_graph=True)[0] for loss in (sum(parts) / 3, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_float32_and_finite_at_the_largest_scale(make, sides, dtype):
    """Half-precision students, and opposed pairs at scale 100."""
    student = [side.to(dtype).requires_grad_() for side in embeddings(N, 8)]
    loss = divergence(student[0], -student[1], torch.tensor(100.0, dtype=dtype), make(*sides).image_to_text.float())
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, student))
