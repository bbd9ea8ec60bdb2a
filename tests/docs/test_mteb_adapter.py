"""The adapter for mteb, with a task that calls it as mteb 2 does; mteb itself is not needed, and never imported."""

from __future__ import annotations

import inspect
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.scores.test_evaluate_options import checkpoint
from train_clip import CLIPWrapper

ADAPTER = Path(__file__).parents[2] / "docs" / "mteb_adapter.py"
# mteb/models/models_protocols.py of mteb 2.26: what a task gives by keyword.
KEYWORDS = {"task_metadata": object(), "hf_split": "test", "hf_subset": "default", "prompt_type": None}


@pytest.fixture
def encoder(tmp_path: Path) -> Any:
    return runpy.run_path(str(ADAPTER))["Encoder"](str(checkpoint(tmp_path / "a.ckpt", 0)), revision="1", unknown=1)


def images(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(number)]


def test_a_task_of_images_and_texts(encoder, tmp_path):
    """Two batches of each, as a retrieval task has them: embeddings of the wrapper's own methods, cosines by NumPy."""
    module = CLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt")
    pictures, texts = images(5), [f"picture {place}" for place in range(5)]
    corpus = encoder.encode([{"image": pictures[:3]}, {"image": pictures[3:]}], **KEYWORDS, batch_size=2)
    queries = encoder.encode([{"text": texts[:3]}, {"text": texts[3:]}], **KEYWORDS, show_progress_bar=False)
    both = encoder.encode([{"image": pictures, "text": texts}], **KEYWORDS)
    expected = module.embed_images(pictures).numpy(), module.embed_texts(texts).numpy()
    np.testing.assert_allclose(corpus, expected[0], atol=1e-5)
    np.testing.assert_allclose(queries, expected[1], atol=1e-5)
    np.testing.assert_allclose(both, expected[0] + expected[1], atol=1e-5)
    cosines = expected[1] @ expected[0].T
    np.testing.assert_allclose(encoder.similarity(queries, torch.from_numpy(corpus)), cosines, atol=1e-5)
    np.testing.assert_allclose(encoder.similarity_pairwise(queries, corpus), cosines.diagonal(), atol=1e-5)


def test_the_name_of_the_results(encoder, monkeypatch):
    """Mteb's own class is asked for a description with a name and a revision; mteb is imported there alone."""
    assert "mteb" not in sys.modules
    stub: Any = ModuleType("mteb.models.model_meta")
    stub.ModelMeta = type("ModelMeta", (), {"create_empty": staticmethod(dict)})
    for name, module in (("mteb", ModuleType("mteb")), ("mteb.models", ModuleType("models")), (stub.__name__, stub)):
        monkeypatch.setitem(sys.modules, name, module)
    assert encoder.mteb_model_meta["name"].startswith("train-clip/") and encoder.mteb_model_meta["revision"] == "1"


def test_it_has_the_methods_that_mteb_asks_for(encoder):
    """Names and parameters of ``EncoderProtocol``."""
    for name in ("encode", "similarity", "similarity_pairwise"):
        assert callable(getattr(encoder, name))
    assert next(iter(inspect.signature(encoder.encode).parameters)) == "inputs"
