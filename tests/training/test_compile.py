"""Compiled towers train as those that are not. Most are traced alone (``aot_eager``): the code made of it is no point.

B  rows of a batch
"""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from tests.training.tiny_encoders import bare_trainer, bert, image_tower
from train_clip import CLIPWrapper, CustomCLIPWrapper
from train_clip.models.blocks import Blocks, Transformer
from train_clip.models.resnet import Bottleneck
from train_clip.models.switches import compile_tower

VIT = {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2}
RESNET = {"size": 64, "blocks": [1, 1, 1, 1], "width": 2}
TEXT = {"context": 12, "vocab": 30, "layers": 2, "width": 12, "heads": 2}
END, B = 29, 8


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled forms of one test do not serve the next."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def wrapper(image: dict[str, Any] = VIT, **how: Any) -> CLIPWrapper:
    torch.manual_seed(0)
    config = {"embed_dim": 8, "image": image, "text": TEXT}
    return CLIPWrapper("small", config, learning_rate=1e-3, eps=0.1, warmup_steps=0, **how)


def loader(size: int = 16) -> DataLoader[Any]:
    """Two batches of captions of all lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (2 * B, 12), generator=generator)
    for row, last in zip(tokens, torch.randint(2, 12, (2 * B,), generator=generator).tolist(), strict=True):
        row[last], row[last + 1 :] = END, 0
    images = torch.randint(256, (2 * B, 3, size, size), generator=generator, dtype=torch.uint8)
    return DataLoader(TensorDataset(images, tokens), batch_size=B)


def fit(module: L.LightningModule, data: DataLoader[Any], **how: Any) -> L.Trainer:
    trainer = bare_trainer(**how)
    trainer.fit(module, data)
    return trainer


def assert_alike(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, own), (other, its) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(own, its, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
@pytest.mark.parametrize(
    ("tower", "shape"),
    [(Transformer(16, 2, 2, "gelu", causal=False), (4, 5, 16)), (Blocks(Bottleneck(2, 2, 2)), (4, 2, 8, 8))],
    ids=["vit", "resnet"],
)
def test_generated_code_is_alike(monkeypatch: pytest.MonkeyPatch, tower: nn.Module, shape: tuple[int, ...]) -> None:
    """PyTorch's own compiler: output, gradients and running statistics, to float32's rounding."""
    monkeypatch.undo()
    compiled, plain = tower, copy.deepcopy(tower)
    compile_tower(compiled, dynamic=False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    # Without vectors, whose headers would take most of the time.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        found = compiled(x)
        found.square().mean().backward()
    expected = plain(x)
    expected.square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert_alike(compiled, plain, 2e-5)
    for own, its in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, its.grad, rtol=0, atol=2e-5)


RECOMPUTED = {"minibatch_size": 3, "gradient_checkpointing": 1}


@pytest.mark.parametrize(
    ("image", "how"),
    [(VIT, {}), (VIT, RECOMPUTED), (RESNET, {"minibatch_size": 4}), (RESNET, RECOMPUTED)],
    ids=["vit", "vit, recomputed", "resnet", "resnet, recomputed"],
)
def test_compiled_towers_train_alike(image: dict[str, Any], how: dict[str, Any]) -> None:
    """Two steps in float32, micro-batches and recomputed blocks too: weights and statistics to float32's rounding."""
    plain, compiled = wrapper(image, **how), wrapper(image, compile=True, **how)
    for module in (plain, compiled):
        fit(module, loader(image["size"]))
    assert counters["stats"]["unique_graphs"] > 0
    assert_alike(compiled.model, plain.model, 2e-5)


def test_compiled_in_bf16():
    """Under autocast: nearer to the run that is not compiled than that is to its start."""
    plain, compiled = wrapper(), wrapper(compile=True)
    start = copy.deepcopy(plain.model)
    for module in (plain, compiled):
        fit(module, loader(), precision="bf16-mixed")

    def distance(one: nn.Module, other: nn.Module) -> float:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return sum((a - b).double().square().sum().item() for a, b in pairs) ** 0.5

    assert distance(compiled.model, plain.model) < 0.05 * distance(plain.model, start)


def test_captions_of_all_lengths_compile_a_few_times():
    """Twelve lengths in as many batches: the number of compiled forms does not grow with them."""
    module = wrapper(compile=True)
    for tower, dynamic in ((module.model.visual, False), (module.model.transformer, True)):
        compile_tower(tower, dynamic)
    for length in range(3, 13):
        tokens = torch.full((B, length), 5)
        tokens[:, -1] = END
        module.model.encode_text(tokens).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_checkpoint_of_a_compiled_run_loads_without(tmp_path: Path):
    """Names and numbers are those of the model; what loads it compiles nothing."""
    module = wrapper(compile=True)
    trainer = fit(module, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert set(module.state_dict()) == set(wrapper().state_dict())
    loaded = CLIPWrapper.load_from_checkpoint(tmp_path / "run.ckpt")
    assert_alike(loaded.model, module.model, 0)
    counters.clear()
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    loaded.embed_images(images)
    assert not counters["stats"]


def test_two_encoders_compile():
    """Encoders of a library, attention mask and teacher included: weights to float32's rounding."""

    def module(**how: Any) -> CustomCLIPWrapper:
        torch.manual_seed(0)
        return CustomCLIPWrapper(image_tower(), bert(), image_size=8, optimizer="adamw", eps=0.1, **how)

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (16, 6), generator=generator)
    images = torch.randint(256, (16, 3, 8, 8), generator=generator, dtype=torch.uint8)
    found = []
    for how in ({}, {"compile": True}):
        found.append(module(**how))
        fit(found[-1], DataLoader(TensorDataset(images, ids), batch_size=B))
    assert_alike(found[1].model, found[0].model, 2e-5)


def test_steps_that_leave_out_patches_compile():
    """A step on half of the patches in chunks, one on all of them: weights to float32's rounding, a few forms."""
    found = []
    for how in ({}, {"compile": True}):
        found.append(wrapper(minibatch_size=3, mask_ratio=0.5, unmasked_share=0.5, **how))
        fit(found[-1], loader())
    assert_alike(found[1].model, found[0].model, 2e-5)
    # Of images those of 3 and of 2 rows, of half and of all patches; of captions one.
    assert counters["stats"]["unique_graphs"] == 5


@pytest.mark.parametrize("how", [{}, {"minibatch_size": 5, "gradient_checkpointing": 1}])
def test_blocks_that_are_left_out_by_chance_compile(how):
    """From 4 to 8 rows, whole images at the end: weights to float32's rounding, and one compiled form a tower."""
    chance = {"stochastic_depth": 0.5, "mask_ratio": 0.5, "unmasked_share": 0.5}
    plain, compiled = wrapper(**how, **chance), wrapper(compile=True, **how, **chance)
    for module in (plain, compiled):
        fit(module, loader())
    assert_alike(compiled.model, plain.model, 2e-5)
    assert counters["stats"]["unique_graphs"] == 2


def test_as_many_rows_as_tokens_is_no_form_of_its_own():
    """8 of 9 rows of 8 tokens, then other numbers before the backward pass: the recomputation meets the same form."""
    torch.manual_seed(0)
    tower = Transformer(16, 4, 2, "gelu", causal=False)
    tower.resblocks.stochastic_depth, tower.resblocks.recompute = 0.5, 1
    compile_tower(tower, dynamic=True)
    x, y = torch.randn(9, 8, 16, requires_grad=True), torch.randn(6, 5, 16, requires_grad=True)
    (tower(x).sum() + tower(y).sum()).backward()
    assert counters["stats"]["unique_graphs"] == 1
