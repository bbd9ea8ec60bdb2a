"""The state dict's names against the field's convention, written out from OpenAI's published files by pattern."""

from __future__ import annotations

import pytest

from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

LAYERS = {"image": 2, "text": 3}
BLOCKS = (1, 2, 1, 2)
TEXT = {"context": 8, "vocab": 20, "layers": LAYERS["text"], "width": 8, "heads": 2}
VIT = {"size": 16, "patch": 8, "layers": LAYERS["image"], "width": 12, "heads": 3}
RESNET = {"size": 32, "blocks": BLOCKS, "width": 4}

BLOCK = [
    *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
    *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
    *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
]
NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def transformer(prefix: str, layers: int) -> set[str]:
    return {f"{prefix}transformer.resblocks.{layer}.{name}" for layer in range(layers) for name in BLOCK}


def text_names() -> set[str]:
    alone = {"token_embedding.weight", "positional_embedding", "text_projection", "logit_scale"}
    return alone | {"ln_final.weight", "ln_final.bias"} | transformer("", LAYERS["text"])


def vit_names() -> set[str]:
    alone = {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.proj"}
    norms = {f"visual.{norm}.{part}" for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    return alone | norms | transformer("visual.", LAYERS["image"])


def convolutions(prefix: str) -> set[str]:
    names = {f"{prefix}conv{number}.weight" for number in (1, 2, 3)}
    return names | {f"{prefix}bn{number}.{part}" for number in (1, 2, 3) for part in NORM}


def resnet_names() -> set[str]:
    names = convolutions("visual.") | {"visual.attnpool.positional_embedding"}
    names |= {f"visual.attnpool.{side}_proj.{part}" for side in "qkvc" for part in ("weight", "bias")}
    for stage, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            names |= convolutions(f"visual.layer{stage}.{block}.")
        shortcut = f"visual.layer{stage}.0.downsample."
        names |= {f"{shortcut}0.weight"} | {f"{shortcut}1.{part}" for part in NORM}
    return names


@pytest.mark.parametrize(("image", "names"), [(VIT, vit_names()), (RESNET, resnet_names())], ids=["vit", "resnet"])
def test_names(image, names):
    """No name of OpenAI's files is absent and none is added, so that their weights load strictly."""
    model = CLIP(config_from_dict({"embed_dim": 8, "image": image, "text": TEXT}))
    assert set(model.state_dict()) == names | text_names()


def test_shapes():
    """The shapes that no multiplication checks: fused projections, positions, and the two transposed projections."""
    model = CLIP(config_from_dict({"embed_dim": 6, "image": VIT, "text": TEXT}))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {
        "visual.conv1.weight": (12, 3, 8, 8),
        "visual.positional_embedding": (5, 12),
        "visual.proj": (12, 6),
        "visual.transformer.resblocks.1.attn.in_proj_weight": (36, 12),
        "visual.transformer.resblocks.1.mlp.c_fc.weight": (48, 12),
        "positional_embedding": (8, 8),
        "token_embedding.weight": (20, 8),
        "text_projection": (8, 6),
        "logit_scale": (),
    }
    assert {name: shapes[name] for name in expected} == expected
