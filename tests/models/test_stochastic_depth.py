"""Blocks that are left out for some rows: on average the plain block, exactly so many rows, and off in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from train_clip import CLIP
from train_clip.models.blocks import Transformer, skip_rates, through_some_rows
from train_clip.models.config import config_from_dict
from train_clip.models.switches import recompute_blocks

B, L, W = 10, 3, 8


def rows(number: int = B) -> Tensor:
    return torch.randn(number, L, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stack(highest: float, layers: int = 4) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(W, layers, 2, "gelu", causal=True).double()
    made.resblocks.stochastic_depth = highest
    return made


def test_rates_by_hand():
    """P · l / L for P = 0.2 and five blocks: the first is left out the least, none is skipped where P is 0."""
    assert skip_rates(0.2, 5) == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert skip_rates(0.0, 3) == [0, 0, 0]


def test_on_average_it_is_the_block():
    """A linear block, 20,000 draws: the mean output is the block's, to five standard errors of each number."""
    torch.manual_seed(0)
    block, x = nn.Linear(4, 4).double(), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        draws = torch.stack([through_some_rows(block, x, 0.4) for _ in range(20_000)])
        errors = draws.std(dim=0) / len(draws) ** 0.5
        assert ((draws.mean(dim=0) - block(x)).abs() < 5 * errors).all()


@pytest.mark.parametrize(
    ("number", "rate", "kept"), [(10, 0.3, 7), (10, 0.04, 10), (10, 0.99, 1), (1, 0.9, 1), (3, 0.5, 2)]
)
def test_so_many_rows_and_no_others(number, rate, kept):
    """round((1 - rate) · B), at least one; the others stay to the bit, these get B / K times the block's residual."""
    seen: list[int] = []

    def block(some: Tensor) -> Tensor:
        seen.append(len(some))
        return some + 1

    x = rows(number)
    found = through_some_rows(block, x, rate)
    changed = (found != x).flatten(1).any(dim=1)
    assert seen == [kept] and int(changed.sum()) == kept
    torch.testing.assert_close(found[changed], x[changed] + number / kept, rtol=0, atol=1e-12)


def test_each_row_is_as_likely():
    """Over 4,000 draws each of 10 rows goes through in 3 of 10, to five standard deviations."""
    torch.manual_seed(0)
    x, counts = torch.zeros(10, 1), torch.zeros(10)
    for _ in range(4_000):
        counts += through_some_rows(lambda some: some + 1, x, 0.7)[:, 0] > 0
    assert (counts / 4_000 - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4_000) ** 0.5


def test_deeper_blocks_see_fewer_rows():
    """Four blocks at 0.8 and ten rows: 8, 6, 4 and 2."""
    model, seen = stack(0.8), []
    for block in model.resblocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    model(rows())
    assert seen == [8, 6, 4, 2]


def test_in_eval_mode_nothing_is_left_out():
    """To the bit, drawing no random number; so it is in training where the share is 0."""
    before = torch.get_rng_state()
    expected = stack(0.0).eval()(rows())
    torch.set_rng_state(before)
    assert torch.equal(stack(0.8).eval()(rows()), expected)
    model = stack(0.0).train()
    before = torch.get_rng_state()
    assert torch.equal(model(rows()), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_of_what_went_through():
    """Against a loop over rows, each with its own scale, for one block whose rows are known: 1e-12."""
    model, plain = stack(0.5, layers=1), stack(0.0, layers=1)
    torch.manual_seed(4)
    found = model(rows())
    changed = (found != rows()).flatten(1).any(dim=1)
    (block,) = plain.resblocks
    expected = [
        row + 2 * (block(row[None])[0] - row) if through else row for row, through in zip(rows(), changed, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)
    found.sin().sum().backward()
    torch.stack(expected).sin().sum().backward()
    for own, its in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, its.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [1, 3])
def test_the_same_rows_in_the_recomputation(group):
    """Both towers, gradients with checkpointing against those without, at one seed: 1e-12."""
    image = {"size": 16, "patch": 8, "layers": 5, "width": 16, "heads": 2}
    text = {"context": 10, "vocab": 30, "layers": 3, "width": 12, "heads": 2}
    pixels = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens = torch.randint(1, 29, (8, 10), generator=torch.Generator().manual_seed(2))
    found = []
    for blocks in (group, 0):
        torch.manual_seed(0)
        model = CLIP(config_from_dict({"embed_dim": 8, "image": image, "text": text})).double()
        for tower in (model.visual.transformer, model.transformer):
            tower.resblocks.stochastic_depth = 0.6
            if blocks:
                recompute_blocks(tower, blocks)
        torch.manual_seed(5)
        (model.encode_image(pixels).sin().sum() + model.encode_text(tokens).cos().sum()).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for own, its in zip(*found, strict=True):
        torch.testing.assert_close(own, its, rtol=0, atol=1e-12)


def test_under_autocast():
    """In bf16 as in float32 to bf16's rounding, for rows in either type; the type of what comes is that of the rows."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Transformer(W, 2, 2, "gelu", causal=False)
        model.resblocks.stochastic_depth = 0.5
        x, found = rows().float(), []
        for enabled in (False, True):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(model(x.to(dtype) if enabled else x))
        assert found[1].dtype == dtype
        torch.testing.assert_close(found[1].float(), found[0], rtol=0.03, atol=0.05)
