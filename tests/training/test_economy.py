"""How a step is computed changes nothing that it computes: compiled, recomputed, kept, and all at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_encoders import bert, image_tower
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from train_clip import CLIPWrapper, CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.switches import compile_tower
from train_clip.options import StepOptions
from train_clip.training import encode as module_of_chunks
from train_clip.training.encode import WeightSubstitutes, _RowsToTable

VIT = {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2}
RESNET = {"size": 64, "blocks": [1, 1, 1, 1], "width": 2}
TEXT = {"context": 12, "vocab": 30, "layers": 2, "width": 12, "heads": 2}
END, B = 29, 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiled forms of one test do not serve the next."""
    torch.compiler.reset()
    counters.clear()


def wrapper(image: dict[str, Any] = VIT, **how: Any) -> CLIPWrapper:
    torch.manual_seed(0)
    config = {"embed_dim": 8, "image": image, "text": TEXT}
    return CLIPWrapper("small", config, learning_rate=1e-3, eps=0.1, warmup_steps=0, **how)


def loader(size: int, steps: int = 3) -> DataLoader[Any]:
    """Captions of all lengths, other ones in each batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (steps * B, 12), generator=generator)
    for row, last in zip(tokens, torch.randint(2, 12, (steps * B,), generator=generator).tolist(), strict=True):
        row[last], row[last + 1 :] = END, 0
    images = torch.randint(256, (steps * B, 3, size, size), generator=generator, dtype=torch.uint8)
    return DataLoader(TensorDataset(images, tokens), batch_size=B)


def fit(module: L.LightningModule, data: DataLoader[Any], **how: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **how,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def assert_alike(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, own), (other, its) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(own, its, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("image", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("how", [{}, {"minibatch_size": 3}, {"minibatch_size": 3, "gradient_checkpointing": 1}])
def test_compiled_towers_train_alike(image, how):
    """Three steps in float32, micro-batches and recomputed blocks too: weights and statistics to float32's rounding."""
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
        fit(module, loader(16), precision="bf16-mixed")

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
    trainer = fit(module, loader(16))
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
    """Two steps on half of the patches in chunks, one on all of them: weights to float32's rounding, a few forms."""
    found = []
    for how in ({}, {"compile": True}):
        found.append(wrapper(minibatch_size=3, mask_ratio=0.5, unmasked_share=0.3, **how))
        fit(found[-1], loader(16))
    assert_alike(found[1].model, found[0].model, 2e-5)
    # Of images those of 3 and of 2 rows, of half and of all patches; of captions one.
    assert counters["stats"]["unique_graphs"] == 5


@pytest.mark.parametrize("how", [{}, {"minibatch_size": 5}, {"minibatch_size": 5, "gradient_checkpointing": 1}])
def test_blocks_that_are_left_out_by_chance_compile(how):
    """From 4 to 8 rows, whole images at the end: weights to float32's rounding, and one compiled form a tower."""
    chance = {"stochastic_depth": 0.5, "mask_ratio": 0.5, "unmasked_share": 0.3}
    plain, compiled = wrapper(**how, **chance), wrapper(compile=True, **how, **chance)
    for module in (plain, compiled):
        fit(module, loader(16))
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


@pytest.mark.parametrize("name", ["minibatch_size", "kept_minibatches", "gradient_checkpointing"])
def test_numbers_that_cannot_work(name):
    with pytest.raises(UserError, match=f"{name} is -1; expected 0 or above"):
        StepOptions(**{name: -1})


def test_a_locked_tower_is_not_asked_to_recompute():
    """It keeps nothing for a backward pass; an encoder that cannot recompute is no obstacle where it is locked."""
    with pytest.raises(UserError, match="ImageTower has no gradient checkpointing"):
        CustomCLIPWrapper(image_tower(), bert(), image_size=8, gradient_checkpointing=1)
    CustomCLIPWrapper(image_tower(), bert(), image_size=8, gradient_checkpointing=1, lock_image=True)


class Words(nn.Module):
    """Two uses of one table that is large enough for its rows to be gathered."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10_000, 3, padding_idx=padding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).sin().sum(dim=(1, 2)) + self.table(tokens[:, 0]).cos().sum(dim=1)


@pytest.mark.parametrize("padding", [None, 7])
@pytest.mark.parametrize("half", [False, True])
def test_a_tables_gradient_by_its_rows(padding, half):
    """Chunks that look up the same rows twice: the dense gradient of the whole, its weight and setting as before."""
    found, plain = Words(padding), Words(padding)
    if half:
        found.table.weight.data = found.table.weight.data.bfloat16()
        plain.table.weight.data = found.table.weight.data.float()
    weight, tokens = found.table.weight, torch.tensor([[1, 7, 1], [9_999, 1, 7], [5, 5, 5], [7, 2, 1]])
    encode = WeightSubstitutes(found, halves=half, tables=True).around(found)
    torch.cat([encode(chunk) for chunk in tokens.split(1)]).sum().backward()
    plain(tokens).sum().backward()
    assert weight.grad.layout == torch.strided and weight.grad.dtype == weight.dtype
    tolerance = 2**-8 * plain.table.weight.grad.abs().max().item() if half else 1e-6
    torch.testing.assert_close(weight.grad.float(), plain.table.weight.grad, rtol=0, atol=tolerance)
    assert found.table.weight is weight and not found.table.sparse


@pytest.mark.parametrize("how", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_a_table_that_does_more_is_left_alone(how):
    """What a table makes of its rows' numbers or norms needs its own gradient."""
    model = nn.Sequential(nn.Embedding(10_000, 3, **how))
    assert not WeightSubstitutes(model, halves=False, tables=True).places


def test_a_run_gathers_its_tables_rows(monkeypatch):
    """Under a Trainer each step makes one gradient of the token table; compiled towers of a library look up as ever."""
    made: list[int] = []
    backward = _RowsToTable.backward
    monkeypatch.setattr(module_of_chunks, "LARGE", 30)
    monkeypatch.setattr(_RowsToTable, "backward", staticmethod(lambda *args: made.append(1) or backward(*args)))
    fit(wrapper(minibatch_size=3), loader(16))
    assert len(made) == 3


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_half_weights_and_recomputed_blocks_need_bf16(precision):
    """Blocks are recomputed out of their stand-ins' sight: refused where those are other numbers than the weights."""
    module = wrapper(gradient_checkpointing=1, half_weights="text")
    with pytest.raises(
        UserError, match=f"--precision {precision}: gradient checkpointing uses half weights directly.* Use bf16-mixed"
    ):
        module.require_precision(precision)


def test_half_weights_and_recomputed_blocks_in_bf16():
    """The same weights after three steps, to the bit, as without recomputation."""
    plain, recomputed = (wrapper(half_weights="both", gradient_checkpointing=group) for group in (0, 1))
    for module in (plain, recomputed):
        fit(module, loader(16), precision="bf16-mixed")
    assert_alike(recomputed.model, plain.model, 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_gives_the_model_back_in_float32(error):
    """Half weights are those of training alone, however it ends."""

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert torch.bfloat16 in {parameter.dtype for parameter in pl_module.parameters()}
            raise error("stop")

    module = wrapper(half_weights="both")
    with pytest.raises((error, SystemExit)):
        fit(module, loader(16), callbacks=[Fails()])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_run_of_before_a_choice_goes_on_with_the_usual_one():
    """Arguments that its checkpoint does not know are those that it was made with; others are refused as ever."""
    module = wrapper()
    kept = {name: value for name, value in module.hparams.items() if name not in ("adam_statistics", "half_weights")}
    module.require_same_model(kept)
    with pytest.raises(UserError, match="half_weights text, was none"):
        wrapper(half_weights="text").require_same_model(kept)


def test_tables_are_looked_up_as_ever_without_gradient():
    """In validation, and where the table is frozen, nothing stands in."""
    model = Words(None)
    with torch.no_grad():
        assert not WeightSubstitutes(model, halves=False, tables=True).places
    model.requires_grad_(False)
    assert not WeightSubstitutes(model, halves=False, tables=True).places
