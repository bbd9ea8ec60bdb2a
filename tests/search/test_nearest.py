"""The nearest embeddings, against sums without rounding and Python's own sort."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from train_clip.search import nearest as module
from train_clip.search.nearest import nearest

NUMBER, DIM = 600, 24


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blocks(rows: np.ndarray, number: int) -> list[np.ndarray]:
    return [rows[first : first + number] for first in range(0, len(rows), number)]


def naive(rows: np.ndarray, query: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Every product as a fraction, sorted by similarity, then by row."""
    exact = [
        (-sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, query, strict=True)), place)
        for place, row in enumerate(rows)
        if np.isfinite(row).all()
    ]
    return [(place, float(-product)) for product, place in sorted(exact)[:k]]


def require_equal(rows: np.ndarray, queries: np.ndarray, k: int, number: int) -> None:
    for found, query in zip(nearest(iter(blocks(rows, number)), queries, k), queries, strict=True):
        expected = naive(rows, query, k)
        assert found.rows.tolist() == [row for row, _ in expected]
        np.testing.assert_allclose(found.similarities, [product for _, product in expected], rtol=0, atol=1e-15)


@pytest.mark.parametrize("number", [1, 7, 100, 10_000])
@pytest.mark.parametrize("k", [1, 9, 150, 1000])
def test_as_without_rounding_in_blocks_of_any_size(number: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rows, a quarter of them twice, which come in the order of rows; more queries than are compared at once."""
    monkeypatch.setattr(module, "QUERIES", 2)
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((120, DIM)))
    rows = rows[rng.permutation(np.r_[0:120, 0:30])]
    require_equal(rows, unit(rng.standard_normal((5, DIM))), k, number)


@pytest.mark.parametrize("number", [13, 10_000])
def test_what_float32_cannot_tell_apart(number: int) -> None:
    """Rows that differ in the last bits of a number: the order is that of the exact products."""
    rng = np.random.default_rng(1)
    query = unit(rng.standard_normal((1, DIM)))
    rows = np.repeat(query, NUMBER, axis=0)
    for row in rows:
        place = rng.integers(DIM)
        row[place] = np.nextafter(row[place], np.float32(rng.choice([-1, 1])))
    in_float32 = rows @ query[0]
    assert len(np.unique(in_float32)) < 10  # of hundreds
    require_equal(rows, query, 50, number)


@pytest.mark.parametrize("number", [100, 997])
def test_equal_rows_come_in_their_order(number: int) -> None:
    rows = np.repeat(unit(np.random.default_rng(2).standard_normal((1, DIM))), 3000, axis=0)
    (found,) = nearest(blocks(rows, number), rows[:1], 40)
    assert found.rows.tolist() == list(range(40)) and len(set(found.similarities.tolist())) == 1


def test_rows_that_are_not_finite_are_passed_over() -> None:
    """Those of unreadable images, and numbers beyond float32: also where that leaves fewer than k, or none."""
    rows = unit(np.random.default_rng(3).standard_normal((40, DIM)))
    rows[::2], rows[5, 3], rows[7] = np.nan, np.inf, 3e38
    found = nearest(blocks(rows, 8), rows[1:2], 100)[0]
    expected = [row for row, _ in naive(rows, rows[1], 100) if row != 7]
    assert [row for row in found.rows if row != 7] == expected and 5 not in found.rows
    assert nearest(blocks(rows[::2], 8), rows[1:2], 3)[0].rows.tolist() == []
    assert nearest([], rows[1:2], 3)[0].rows.tolist() == []
