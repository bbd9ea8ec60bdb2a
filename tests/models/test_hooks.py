"""Every layer of a model is called: forward hooks fire on it, and pruned weights train."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from train_clip import CLIP, CLIPWrapper
from train_clip.models.config import config_from_dict
from train_clip.training import encode

IMAGES = {
    "vit": {"size": 16, "patch": 4, "layers": 2, "width": 16, "heads": 2},
    "resnet": {"size": 64, "blocks": [2, 1, 1, 1], "width": 2},
}
TEXT = {"context": 8, "vocab": 30, "layers": 2, "width": 12, "heads": 2}
END, B = 29, 6


def build(kind: str, activation: str = "quick_gelu") -> CLIP:
    torch.manual_seed(0)
    config = {"embed_dim": 8, "image": IMAGES[kind], "text": TEXT, "activation": activation}
    model = CLIP(config_from_dict(config)).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model


def batch(kind: str, number: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (number, 8), generator=generator)
    tokens[:, -1] = END
    size = IMAGES[kind]["size"]
    return torch.randint(256, (number, 3, size, size), generator=generator, dtype=torch.uint8), tokens


def gradients(model: CLIP, kind: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    images, texts = model(*batch(kind))
    (images.sin().sum() + texts.cos().sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-11 * max(1.0, gradient.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_hooks_fire_on_every_layer(kind, activation, kept):
    """Each once a pass, patches dropped or not; gradients stay those of the model without hooks."""
    model = build(kind, activation)
    if kind == "vit":
        model.visual.kept_patches = kept
    plain, fired = copy.deepcopy(model), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    assert_equal(gradients(model, kind), gradients(plain, kind))
    assert sorted(fired) == sorted(name for name, _ in model.named_modules())


def test_a_hook_changes_what_follows():
    """Of the first layer, the activation, a projection and the attention: what a hook returns is what goes on."""
    layers = ["visual.conv1", "visual.ln_pre"] + [
        f"{tower}transformer.resblocks.1.{name}"
        for tower in ("visual.", "")
        for name in ("attn", "attn.out_proj", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "ln_1", "ln_2")
    ]
    for name in layers:
        model = build("vit")
        before = model(*batch("vit"))[0]
        model.get_submodule(name).register_forward_hook(lambda _, __, output: 1.5 * output)
        assert (model(*batch("vit"))[0] - before).abs().max() > 1e-6, name


def test_backward_hooks():
    """They see the gradient of the layer's output."""
    model, seen = build("vit"), []
    for name in ("visual.conv1", "visual.transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.0.mlp.gelu"):
        model.get_submodule(name).register_full_backward_hook(lambda _, __, gradient: seen.append(gradient[0].shape))
    gradients(model, "vit")
    assert sorted(map(tuple, seen)) == [(B, 8, 48), (B, 16, 4, 4), (B, 16 + 1, 64)]


IN_BLOCK = ("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "ln_1.weight", "attn.in_proj_weight")
PRUNED = {
    "vit": [
        *("visual.conv1.weight", "visual.ln_pre.weight", "visual.proj", "token_embedding.weight"),
        *(f"visual.transformer.resblocks.{block}.{name}" for block in (0, 1) for name in IN_BLOCK),
        *(f"transformer.resblocks.{block}.{name}" for block in (0, 1) for name in (*IN_BLOCK, "attn.out_proj.weight")),
    ],
    "resnet": [
        *(f"visual.{name}.weight" for name in ("conv1", "layer1.0.conv2", "layer4.0.conv3", "layer2.0.downsample.0")),
        *("visual.attnpool.v_proj.weight", "visual.attnpool.c_proj.weight", "transformer.resblocks.0.mlp.c_fc.weight"),
    ],
}


def pruned(model: nn.Module, kind: str) -> dict[str, tuple[nn.Module, str]]:
    """Half of each weight pruned by its size."""
    layers = {place: place.rpartition(".") for place in PRUNED[kind]}
    places = {place: (model.get_submodule(layer), name) for place, (layer, _, name) in layers.items()}
    for module, name in places.values():
        prune.l1_unstructured(module, name, amount=0.5)
    return places


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_pruned_model_is_one_of_zeros(kind):
    """Gradients against a model whose weights are the pruned ones, masked; those of pruned entries are zero."""
    model, plain = build(kind), build(kind)
    places = pruned(model, kind)
    for place, (layer, name) in places.items():
        plain.get_parameter(place).data = getattr(layer, name).detach().clone()
    found, expected = gradients(model, kind), gradients(plain, kind)
    for place, (module, name) in places.items():
        mask = getattr(module, f"{name}_mask")
        expected[f"{place}_orig"] = expected.pop(place) * mask
        assert (found[f"{place}_orig"][mask == 0] == 0).all() and (mask == 0).any()
    assert_equal(found, expected)


HOW: list[dict[str, Any]] = [
    {},
    {"minibatch_size": 4},
    {"minibatch_size": 4, "kept_minibatches": 1, "gradient_checkpointing": 1},
    {"gradient_checkpointing": 2},
    {"minibatch_size": 4, "gradient_checkpointing": 1, "half_weights": "both", "adam_statistics": "bfloat16"},
]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("how", HOW)
def test_a_pruned_model_trains(kind, how, monkeypatch):
    """Three steps however they are computed: masks stay, pruned entries have no gradient, and the others move."""
    monkeypatch.setattr(encode, "LARGE", 30)  # the table of tokens is one whose gradient comes by its rows
    torch.manual_seed(0)
    config = {"embed_dim": 8, "image": IMAGES[kind], "text": TEXT}
    module = CLIPWrapper("small", config, learning_rate=1e-2, warmup_steps=0, **how)
    places = pruned(module.model, kind)
    masks = {place: getattr(layer, f"{name}_mask").clone() for place, (layer, name) in places.items()}
    start = {place: getattr(layer, f"{name}_orig").detach().clone() for place, (layer, name) in places.items()}
    checked: list[str] = []

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            for place, (layer, name) in places.items():
                assert (getattr(layer, f"{name}_orig").grad[masks[place] == 0] == 0).all(), place
                checked.append(place)

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[Gradients()],
        enable_progress_bar=False, enable_model_summary=False,
        precision="bf16-mixed" if "half_weights" in how else "32-true",
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*batch(kind, 3 * B)), batch_size=B))
    assert len(checked) == 3 * len(places)
    for place, (layer, name) in places.items():
        assert torch.equal(getattr(layer, f"{name}_mask"), masks[place])
        moved = getattr(layer, f"{name}_orig") != start[place]
        assert moved[masks[place] == 1].any(), place


@pytest.fixture
def in_double() -> Iterator[None]:
    """Everywhere: PyTorch 2.11 holds the default dtype of a backward pass against that of the forward pass."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_pruned_model_trains_alike_in_chunks(kind, in_double):
    """Micro-batches and recomputed blocks, against the same chunks kept, in float64: weights to 1e-9."""
    found = []
    for how in ({"kept_minibatches": 9}, {"gradient_checkpointing": 1}):
        torch.manual_seed(0)
        config = {"embed_dim": 8, "image": IMAGES[kind], "text": TEXT}
        module = CLIPWrapper("small", config, 4, learning_rate=1e-2, eps=0.1, warmup_steps=0, **how)
        pruned(module.model, kind)
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, precision="64-true",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*batch(kind, 3 * B)), batch_size=B))
        found.append(module.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-9, msg=name)
