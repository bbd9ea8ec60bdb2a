"""Initial weights against openai/CLIP's ``initialize_parameters`` and PyTorch's defaults, by their moments.

Of n draws the mean lies within 5 σ / √n and the deviation within 5 σ / √(2 n) of the distribution's own: wide enough
for any of the 200 tensors, narrow enough to tell W^-0.5 from its neighbours.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

WIDTH, LAYERS = 128, 6  # of the text tower
IMAGE_WIDTH, PATCH = 96, 8
STEM = 16
CHANNELS = 32 * STEM  # of a ResNet's last map
TEXT = {"context": 40, "vocab": 1000, "layers": LAYERS, "width": WIDTH, "heads": 4}
VIT = {"size": 64, "patch": PATCH, "layers": 3, "width": IMAGE_WIDTH, "heads": 4}
RESNET = {"size": 64, "blocks": [1, 2, 2, 1], "width": STEM}


def build(image: dict[str, object]) -> CLIP:
    torch.manual_seed(0)
    return CLIP(config_from_dict({"embed_dim": 80, "image": image, "text": TEXT}))


@pytest.fixture(scope="module")
def vit() -> CLIP:
    return build(VIT)


@pytest.fixture(scope="module")
def resnet() -> CLIP:
    return build(RESNET)


def assert_normal(tensor: Tensor, deviation: float) -> None:
    assert_moments(tensor, deviation)
    # A uniform distribution of the same deviation ends at √3 deviations.
    assert tensor.abs().max() > 1.9 * deviation


def assert_uniform(tensor: Tensor, bound: float) -> None:
    assert_moments(tensor, bound / math.sqrt(3))
    assert 0.9 * bound < tensor.abs().max() <= bound * (1 + 1e-6)


def assert_moments(tensor: Tensor, deviation: float) -> None:
    values = tensor.detach().double().flatten()
    assert abs(values.mean()) < 5 * deviation / math.sqrt(len(values))
    assert values.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * len(values)))


def assert_linear_default(weight: Tensor, bias: Tensor | None = None) -> None:
    """``nn.Linear`` and ``nn.Conv2d``: uniform within 1 / √inputs, weight and bias."""
    bound = weight[0].numel() ** -0.5
    assert_uniform(weight, bound)
    if bias is not None:
        assert_uniform(bias, bound)


def test_text_tower(vit):
    """Embeddings, and each block's four matrices, normal with openai/CLIP's deviations; W width, L layers."""
    assert_normal(vit.token_embedding.weight, 0.02)
    assert_normal(vit.positional_embedding, 0.01)
    assert_normal(vit.text_projection, WIDTH**-0.5)
    for block in vit.transformer.resblocks:
        assert_normal(block.attn.in_proj_weight, WIDTH**-0.5)
        assert_normal(block.attn.out_proj.weight, WIDTH**-0.5 * (2 * LAYERS) ** -0.5)
        assert_normal(block.mlp.c_fc.weight, (2 * WIDTH) ** -0.5)
        assert_normal(block.mlp.c_proj.weight, WIDTH**-0.5 * (2 * LAYERS) ** -0.5)


def test_text_biases(vit):
    """Attention biases 0 as ``nn.MultiheadAttention`` leaves them, the MLP's ``nn.Linear``'s own, norms 1 and 0."""
    for block in vit.transformer.resblocks:
        assert_attention_biases_are_zero(block)
        assert_uniform(block.mlp.c_fc.bias, WIDTH**-0.5)
        assert_uniform(block.mlp.c_proj.bias, (4 * WIDTH) ** -0.5)
    assert_norms_are_neutral(vit)


def test_image_tower(vit):
    """Class token, positions and projection W^-0.5 normal; convolution and blocks PyTorch's defaults."""
    visual = vit.visual
    for tensor in (visual.class_embedding, visual.positional_embedding, visual.proj):
        assert_normal(tensor, IMAGE_WIDTH**-0.5)
    assert_linear_default(visual.conv1.weight)
    for block in visual.transformer.resblocks:
        # Xavier over the fused matrix: √(6 / (3 W + W)).
        assert_uniform(block.attn.in_proj_weight, math.sqrt(6 / (4 * IMAGE_WIDTH)))
        assert_linear_default(block.attn.out_proj.weight)
        assert_attention_biases_are_zero(block)
        assert_linear_default(block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        assert_linear_default(block.mlp.c_proj.weight, block.mlp.c_proj.bias)


def test_image_tower_starts_as_pytorch_does(vit):
    """The blocks' projections against ``nn.MultiheadAttention``'s own, by deviation."""
    torch.manual_seed(1)
    reference = torch.nn.MultiheadAttention(IMAGE_WIDTH, 4)
    attention = vit.visual.transformer.resblocks[0].attn
    for own, theirs in (
        (attention.in_proj_weight, reference.in_proj_weight),
        (attention.out_proj.weight, reference.out_proj.weight),
    ):
        assert own.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert not reference.in_proj_bias.any() and not reference.out_proj.bias.any()


def test_attention_pool(resnet):
    """Positions and the four projections C^-0.5 normal, biases ``nn.Linear``'s own."""
    pool = resnet.visual.attnpool
    assert_normal(pool.positional_embedding, CHANNELS**-0.5)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert_normal(projection.weight, CHANNELS**-0.5)
        assert_uniform(projection.bias, CHANNELS**-0.5)


def test_residual_branches_start_at_zero(resnet):
    """The last BatchNorm of each bottleneck has gain 0 and no other has; convolutions are PyTorch's default."""
    gains = {name: p for name, p in resnet.visual.named_parameters() if name.endswith(("bn3.weight",))}
    blocks = {name for name in gains if name.startswith("layer")}
    assert len(blocks) == sum(RESNET["blocks"])
    for name, module in resnet.visual.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == (0 if f"{name}.weight" in blocks else 1)).all(), name
            assert not module.bias.any() and not module.running_mean.any() and (module.running_var == 1).all()
        if isinstance(module, torch.nn.Conv2d):
            assert_linear_default(module.weight)


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_temperature(model, request):
    """The log of the scale starts at ln(1 / 0.07) (CLIP paper, section 2.5)."""
    logit_scale = request.getfixturevalue(model).logit_scale
    assert logit_scale.shape == ()
    assert logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)


@pytest.mark.parametrize(("value", "clamped"), [(9.0, math.log(100)), (4.7, math.log(100)), (4.6, 4.6), (-3.0, -3.0)])
def test_clamp(value, clamped):
    """A scale over 100 becomes 100, a smaller one stays, without a trace in the graph."""
    model = build(VIT)
    with torch.no_grad():
        model.logit_scale.fill_(value)
    model.clamp_temperature()
    assert model.logit_scale.item() == pytest.approx(clamped, abs=1e-6)
    assert model.logit_scale.requires_grad and model.logit_scale.is_leaf
    assert model.logit_scale.exp() <= 100 * (1 + 1e-6)


def assert_attention_biases_are_zero(block: torch.nn.Module) -> None:
    assert not block.attn.in_proj_bias.any()
    assert not block.attn.out_proj.bias.any()


def assert_norms_are_neutral(model: CLIP) -> None:
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * LAYERS + 2 * 3 + 3
    for norm in norms:
        assert (norm.weight == 1).all() and not norm.bias.any()
