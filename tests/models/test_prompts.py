"""Visual prompts against the paper's formula written out block by block, and what stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.prompts.file import PromptConfig
from train_clip.prompts.model import PromptedTransformer, add_prompts
from train_clip.prompts.prompt_tune import PromptOptions

BLOCKS, WIDTH, PATCH = 4, 16, 8
IMAGE = {"size": 24, "patch": PATCH, "layers": BLOCKS, "width": WIDTH, "heads": 2}
TEXT = {"context": 8, "vocab": 50, "layers": 1, "width": 12, "heads": 2}
RESNET = {"size": 32, "blocks": [1, 1, 1, 1], "width": 8}


def clip(image: dict[str, object] = IMAGE) -> CLIP:
    torch.manual_seed(0)
    return CLIP(config_from_dict({"embed_dim": 10, "image": image, "text": TEXT})).double()


def prompted(model: CLIP, layers: tuple[int, ...], number: int = 3, dropout: float = 0.0) -> PromptedTransformer:
    add_prompts(model, PromptConfig(number, layers, dropout, class_token=True))
    model.double()
    assert isinstance(model.visual, PromptedTransformer)
    return model.visual


def by_hand(model: CLIP, images: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """One image at a time: [class; prompts; patches] into each block; a block's own prompts replace those before."""
    visual, rows = model.visual, []
    for image in images:
        patches = visual.conv1(image[None])[0].flatten(1).T
        x = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding
        x = visual.ln_pre(x)
        class_token, between, patches = x[:1], x[:0], x[1:]
        for number, block in enumerate(visual.transformer.resblocks):
            between = prompts.get(number, between)
            out = block(torch.cat([class_token, between, patches])[None])[0]
            class_token, patches = out[:1], out[1 + len(between) :]
            between = out[1 : 1 + len(between)]
        rows.append(visual.ln_post(class_token)[0] @ visual.proj)
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0,), (0, 1, 2), (1, 3), (2, 3), (3,)])
@torch.no_grad()
def test_each_block_has_its_prompts(layers):
    """Deep, shallow, the fork's (all but the last), and blocks in between, against the loop, in float64: 1e-12."""
    model = clip()
    plain = copy.deepcopy(model)
    visual = prompted(model, layers)
    images = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    own = {int(number): prompts for number, prompts in visual.prompts.items()}
    assert tuple(own) == layers
    torch.testing.assert_close(model.encode_image(images), by_hand(plain, images, own), rtol=0, atol=1e-12)


def test_the_kinds_of_the_paper():
    """Section 3.2: VPT-deep at every block, VPT-shallow at the first."""
    deep, shallow = (PromptOptions(prompt_kind=kind).config(3) for kind in ("deep", "shallow"))
    assert (list(deep.layers), list(shallow.layers)) == ([0, 1, 2], [0])


def test_where_prompts_begin():
    """U(-v, v) with v = √(6 / (3 · patch² + width)): within the bound, and of its variance v² / 3."""
    visual = prompted(clip(), (0, 1, 2, 3), number=500)
    bound = math.sqrt(6 / (3 * PATCH**2 + WIDTH))
    values = torch.cat([prompts.flatten() for prompts in visual.prompts.values()])
    assert values.abs().max() <= bound and values.abs().max() > 0.99 * bound
    assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize("class_token", [True, False])
def test_what_is_trained(class_token):
    """The prompts, and the class embedding where it is asked for; all else asks for no gradient and stays in eval."""
    model = clip()
    add_prompts(model, PromptConfig(3, (0, 1), 0.5, class_token))
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"visual.prompts.0", "visual.prompts.1"} | (
        {"visual.backbone.class_embedding"} if class_token else set()
    )
    assert trained == expected
    assert model.visual.dropout.training and not any(part.training for part in model.visual.backbone.modules())
    assert not model.eval().visual.dropout.training


def test_dropout_falls_on_prompts_in_training_alone():
    """In eval mode two passes agree; in training the same image twice in a batch has different embeddings."""
    model = clip()
    prompted(model, (0, 1), dropout=0.5)
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64).expand(2, -1, -1, -1)
    one, two = model.train().encode_image(images)
    assert not torch.equal(one, two)
    one, two = model.eval().encode_image(images)
    torch.testing.assert_close(one, two)


def test_every_prompt_gets_a_gradient():
    """Those of the last block too, through the class token's attention: none is dead, as the fork's last are."""
    model = clip()
    visual = prompted(model, (0, 1, 2, 3))
    model.encode_image(torch.randn(2, 3, 24, 24, dtype=torch.float64)).square().sum().backward()
    assert all(prompts.grad.abs().min(dim=1).values.max() > 0 for prompts in visual.prompts.values())


@pytest.mark.parametrize(
    ("image", "config", "message"),
    [
        (RESNET, (3, (0,), 0.0, True), "a ResNet, which has no tokens to add prompts to"),
        (IMAGE, (3, (0, 4), 0.0, True), "Prompts at block 4; .* has the blocks 0 to 3"),
        (IMAGE, (0, (0,), 0.0, True), "0 prompts; expected 1 or above"),
        (IMAGE, (3, (), 0.0, True), r"Prompts at the blocks \[\]"),
        (IMAGE, (3, (1, 0), 0.0, True), r"Prompts at the blocks \[1, 0\]"),
        (IMAGE, (3, (0, 0), 0.0, True), r"Prompts at the blocks \[0, 0\]"),
        (IMAGE, (3, (-1,), 0.0, True), r"Prompts at the blocks \[-1\]"),
        (IMAGE, (3, (0,), 1.0, True), "A dropout of 1.0; expected from 0 to below 1"),
    ],
)
def test_what_cannot_work_is_refused(image, config, message):
    """A tower without tokens, blocks that are not there, and numbers that are none."""
    with pytest.raises(UserError, match=message):
        add_prompts(clip(image), PromptConfig(*config))
