"""The index by usearch: its recall against exact comparison, when it is built, and damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.search.made import save_embeddings, save_model, unit_rows
from train_clip.errors import UserError
from train_clip.search import index as module
from train_clip.search.index import Index
from train_clip.search.vectors import Vectors, open_vectors

NUMBER, LOST = 5000, (3, 77, 4999)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def saved(model: Path, tmp_path: Path) -> Callable[..., Vectors]:
    """Writes random embeddings, three of them NaN."""

    def save(seed: int = 0) -> Vectors:
        rows, names = unit_rows(NUMBER, seed=seed), [f"{row}.png" for row in range(NUMBER)]
        rows[[*LOST]] = np.nan
        return open_vectors(save_embeddings(tmp_path / "x.npy", model, rows, names, names, tmp_path))

    return save


def probes() -> np.ndarray:
    return unit_rows(50, seed=9)


def test_most_of_the_nearest_are_found(saved, capsys) -> None:
    """Against a sort of all products; the recall that is printed is the one counted here; NaN is never found."""
    vectors, queries = saved(), probes()
    index, rows = Index(vectors, probes), np.load(vectors.path)
    products = np.nan_to_num(queries.astype(np.float64) @ rows.T.astype(np.float64), nan=-2)
    expected = np.argsort(-products, axis=1)[:, : module.RECALL_AT]
    found = index(queries, module.RECALL_AT)
    recall = np.mean([len({*one.rows} & {*some}) for one, some in zip(found, expected, strict=True)]) / module.RECALL_AT
    assert recall > 0.97
    assert f"finds {recall:.1%} (50 queries)" in capsys.readouterr().out
    for place, one in enumerate(found):
        np.testing.assert_allclose(one.similarities, products[place, one.rows], atol=2e-3)  # of float16
        assert not {*one.rows} & {*LOST} and (np.diff(one.similarities) <= 0).all()
    (alone,) = index(queries[:1], 3)
    assert alone.rows.tolist() == found[0].rows[:3].tolist()
    np.testing.assert_allclose(index.embedding(8), rows[8], atol=1e-3)
    assert np.isnan(index.embedding(LOST[0])).all()
    assert max(map(len, (one.rows for one in index(queries, 6000)))) <= NUMBER - len(LOST)


def test_built_once_and_again_for_other_embeddings(saved, capsys) -> None:
    vectors = saved()
    Index(vectors, probes)
    assert "recall" not in capsys.readouterr().err
    kept = Path(f"{vectors.path}.usearch")
    state = kept.stat().st_mtime_ns
    again = Index(open_vectors(vectors.path), probes)
    assert kept.stat().st_mtime_ns == state and capsys.readouterr().out == ""
    before = again(probes()[:1], 5)[0].rows.tolist()
    for file in vectors.path.parent.glob("x.npy") or ():
        file.unlink()
    other = saved(seed=1)
    os.utime(other.path, ns=(1, 1))
    assert Index(other, probes)(probes()[:1], 5)[0].rows.tolist() != before
    assert kept.stat().st_mtime_ns != state and "building" in capsys.readouterr().out


def test_an_index_is_complete_or_absent(saved, monkeypatch) -> None:
    """What ends while it is built, or before it is tried, leaves none that would be used."""
    vectors = saved()

    def stop() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Index(vectors, stop)
    assert not Path(f"{vectors.path}.usearch.json").exists()
    monkeypatch.setattr(module, "counted", lambda vectors: (stop() for _ in "x"))
    with pytest.raises(KeyboardInterrupt):
        Index(vectors, probes)
    assert not list(vectors.path.parent.glob("*.tmp-*"))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "another"])
def test_a_damaged_index_is_named(damage: str, saved) -> None:
    vectors = saved()
    Index(vectors, probes)
    kept = Path(f"{vectors.path}.usearch")
    content = kept.read_bytes()
    if damage == "another":
        from usearch.index import Index as Library

        Library(ndim=3, metric="cos", dtype="f16").save(str(kept))
    else:
        kept.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "text": b"no index at all\n" * 100}[damage]
        )
    with pytest.raises(UserError, match=r"x\.npy\.usearch: no index of these embeddings, or damaged .*Remove it"):
        Index(vectors, probes)


def test_without_room(saved, monkeypatch) -> None:
    vectors = saved()
    monkeypatch.setattr(module, "EDGES", 10**15)
    with pytest.raises(UserError, match="the index takes"):
        Index(vectors, probes)
