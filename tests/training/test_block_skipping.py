"""Which towers leave out blocks, and that a run leaves out the same ones however its step is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_encoders import bert, image_tower

from train_clip import CLIPWrapper, CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.models.switches import recompute_blocks
from train_clip.training.encode import Chunks, encode_in_chunks

VIT = {"size": 16, "patch": 8, "layers": 3, "width": 16, "heads": 2}
RESNET = {"size": 64, "blocks": [1, 1, 1, 1], "width": 2}
TEXT = {"context": 8, "vocab": 30, "layers": 2, "width": 12, "heads": 2}


def wrapper(image: dict[str, Any] = VIT, **how: Any) -> CLIPWrapper:
    torch.manual_seed(0)
    return CLIPWrapper("small", {"embed_dim": 8, "image": image, "text": TEXT}, warmup_steps=0, **how)


def test_both_towers_but_locked_ones():
    def highest(**how: Any) -> tuple[float, float]:
        model = wrapper(stochastic_depth=0.3, **how).model
        image, text = model.visual.transformer.resblocks, model.transformer.resblocks
        return image.stochastic_depth, text.stochastic_depth

    assert highest() == (0.3, 0.3)
    assert highest(lock_image=True) == (0.0, 0.3)


@pytest.mark.parametrize("group", [0, 1, 2])
def test_chunks_leave_out_the_same_in_the_recomputation(group):
    """Chunks of 4 and 3 that are recomputed, their blocks too, against the same chunks that are kept: 1e-12."""
    images = torch.randint(256, (7, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = []
    for chunks, blocks in ((Chunks(4, seed=(1, 2)), group), (Chunks(4, kept=99, seed=(1, 2)), 0)):
        model = wrapper(stochastic_depth=0.6).model.double().train()
        if blocks:
            recompute_blocks(model.visual, blocks)
        encode_in_chunks(model.encode_image, images, chunks, model.visual).sin().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.visual.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=1e-12, msg=name)


def test_what_cannot_leave_blocks_out():
    with pytest.raises(UserError, match=r"stochastic_depth is 0\.1; the image tower is ModifiedResNet"):
        wrapper(RESNET, stochastic_depth=0.1)
    wrapper(RESNET, stochastic_depth=0.1, lock_image=True)
    with pytest.raises(UserError, match=r"the text tower is BertModel.*lock_text"):
        CustomCLIPWrapper(image_tower(), bert(), image_size=8, lock_image=True, stochastic_depth=0.1)
    with pytest.raises(UserError, match=r"stochastic_depth is 1\.0; expected from 0 to below 1"):
        wrapper(stochastic_depth=1.0)
