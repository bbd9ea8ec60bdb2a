"""Gradient checkpointing against the same tower without it, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.training.tiny_encoders import bert, image_tower
from train_clip import CLIP, CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.models.blocks import Blocks, run_blocks
from train_clip.models.config import config_from_dict
from train_clip.models.resnet import Bottleneck
from train_clip.models.switches import recompute_blocks
from train_clip.prompts.file import PromptConfig
from train_clip.prompts.model import add_prompts

IMAGES = {
    "vit": {"size": 16, "patch": 8, "layers": 5, "width": 16, "heads": 2},
    "resnet": {"size": 64, "blocks": [2, 1, 1, 1], "width": 2},
}
TEXT = {"context": 10, "vocab": 30, "layers": 3, "width": 12, "heads": 2}


def build(kind: str) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config_from_dict({"embed_dim": 8, "image": IMAGES[kind], "text": TEXT})).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model


def images(kind: str) -> Tensor:
    size = IMAGES[kind]["size"]
    return torch.randint(256, (4, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.grad) for name, parameter in module.named_parameters() if parameter.grad is not None)


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    pairs = list(zip(gradients(found), gradients(expected), strict=True))
    assert pairs
    for (name, own), (other, its) in pairs:
        assert name == other
        torch.testing.assert_close(own, its, rtol=0, atol=1e-12 * max(1.0, its.abs().max().item()), msg=name)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("group", [1, 2, 5, 99])
def test_gradient_and_running_statistics(kind, group):
    """Both towers: every gradient to 1e-12, and BatchNorms updated once, bit for bit."""
    model, plain = build(kind), build(kind)
    recompute_blocks(model.visual, group)
    recompute_blocks(model.transformer, group)
    tokens = torch.randint(1, 29, (4, 10), generator=torch.Generator().manual_seed(2))
    for each in (model, plain):
        (each.encode_image(images(kind)).sin().sum() + each.encode_text(tokens).cos().sum()).backward()
    assert_equal(model, plain)
    for (name, own), its in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(own, its), name


@pytest.mark.parametrize(("kind", "block"), [("vit", nn.Module), ("resnet", Bottleneck)])
def test_what_is_computed_again(kind, block):
    """Each block is run once forward and once more in the backward pass; none is where nothing is recomputed."""
    for group, expected in ((0, 1), (1, 2), (2, 2)):
        model = build(kind)
        if group:
            recompute_blocks(model.visual, group)
        blocks = (
            list(model.visual.transformer.resblocks)
            if kind == "vit"
            else [module for module in model.visual.modules() if isinstance(module, block)]
        )
        calls: list[int] = []
        for number, each in enumerate(blocks):
            each.register_forward_pre_hook(lambda *_, number=number, calls=calls: calls.append(number))
        model.encode_image(images(kind)).sum().backward()
        assert sorted(calls) == sorted(expected * list(range(len(blocks))))


def test_what_is_kept():
    """Of six blocks in threes, what lies between the two is alive after the forward pass, and nothing else is."""
    outputs: list[StorageWeakRef] = []
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(StorageWeakRef(out.untyped_storage())))
    last = run_blocks(blocks, torch.randn(2, 4, requires_grad=True), 3)
    alive = [not output.expired() for output in outputs]
    assert alive == [False, False, True, False, False, True]
    assert last.requires_grad


@pytest.mark.parametrize("group", [1, 2, 3])
def test_prompts_with_dropout(group):
    """Prompts deep in a frozen tower, dropout on: the same masks in the recomputation, gradients to 1e-12."""
    model = build("vit")
    add_prompts(model, PromptConfig(2, (0, 1, 3), 0.5, True))
    model.double().train()
    plain = copy.deepcopy(model)
    recompute_blocks(model.visual, group)
    for each in (model, plain):
        torch.manual_seed(5)
        each.encode_image(images("vit")).sin().sum().backward()
    assert_equal(model, plain)


def test_without_gradient_nothing_is_kept_for_it():
    """Under ``no_grad`` the blocks are simply run."""
    model = build("vit")
    recompute_blocks(model.visual, 1)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images("vit")), build("vit").encode_image(images("vit")))


def test_towers_of_libraries():
    """Transformers' own way where there is one, timm's likewise; else it is said what would help."""
    asked: list[object] = []

    class OfTransformers(nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
            asked.append(gradient_checkpointing_kwargs)

    class OfTimm(nn.Module):
        def set_grad_checkpointing(self, enable: bool) -> None:
            asked.append(enable)

    recompute_blocks(OfTransformers(), 1)
    recompute_blocks(OfTimm(), 1)
    assert asked == [{"use_reentrant": False}, True]
    with pytest.raises(UserError, match=r"Linear has no gradient checkpointing: .* minibatch_size"):
        recompute_blocks(nn.Linear(2, 2), 1)
    with pytest.raises(UserError, match=r"gradient_checkpointing is 2; OfTimm .* Expected 1"):
        recompute_blocks(OfTimm(), 2)


def test_a_real_encoder_of_transformers():
    """A BERT recomputes its layers, with dropout, to the gradient that it has without."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=60
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).double().train()
    plain = copy.deepcopy(model)
    recompute_blocks(model, 1)
    calls: list[int] = []
    model.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: calls.append(1))
    for each in (model, plain):
        torch.manual_seed(3)
        each(input_ids=torch.arange(24).reshape(2, 12)).last_hidden_state.sin().sum().backward()
    assert len(calls) == 2
    assert_equal(model, plain)


def test_all_stacks_of_a_tower_are_found():
    """A transformer within another module, as in a text tower that is joined with another encoder."""
    model = build("vit")
    recompute_blocks(nn.ModuleList([model]), 3)
    assert [module.recompute for module in model.modules() if isinstance(module, Blocks)] == [3, 3]


def test_a_locked_tower_is_not_asked_to_recompute():
    """It keeps nothing for a backward pass; an encoder that cannot recompute is no obstacle where it is locked."""
    with pytest.raises(UserError, match="ImageTower has no gradient checkpointing"):
        CustomCLIPWrapper(image_tower(), bert(), image_size=8, gradient_checkpointing=1)
    CustomCLIPWrapper(image_tower(), bert(), image_size=8, gradient_checkpointing=1, lock_image=True)
