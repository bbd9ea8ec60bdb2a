"""Muon against PyTorch's own, and against formulas in float64; what goes where, by name; one optimizer in every way."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TINY
from tests.training.tiny_encoders import SIDE, WIDTH, bert, image_tower
from train_clip import CustomCLIPWrapper, PromptCLIPWrapper
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.options import OptimizerOptions, TrainingOptions
from train_clip.prompts.file import PromptConfig
from train_clip.training import half_precision as half_adamw
from train_clip.training import muon
from train_clip.training.muon import BUFFER, Muon, hidden_matrices, orthogonalise, row_blocks
from train_clip.training.optimizer import build_optimizer, parameter_groups

RATE, DECAY = 1e-2, 0.2
NUMBERS: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": DECAY}
MUON = NUMBERS | {"optimizer": "muon", "momentum": 0.95}
HALF = {"adam_statistics": "bfloat16"}
RESNET = TINY | {"image": {"size": 32, "blocks": [1, 1, 1, 1], "width": 4}}
SHAPES = [(12, 12), (12, 48), (48, 12), (36, 12), (20, 12), (36, 12)]  # the fourth and the last hold three blocks


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(matrices: list[nn.Parameter], *others: nn.Parameter, **how: Any) -> Muon:
    rest = torch.optim.AdamW(list(others) or [nn.Parameter(torch.zeros(3))], lr=RATE, weight_decay=0.0)
    options = OptimizerOptions(**MUON, **(HALF if how.pop("half_momentum", False) else {}))
    return Muon([{"params": matrices, "lr": RATE, "weight_decay": DECAY}], rest, options, **how)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(seeded(*shape, seed=place)) for place, shape in enumerate(SHAPES)]


def steps(optimizer: Any, matrices: list[nn.Parameter], numbers: range) -> None:
    """Gradients of a step's number; one matrix has none in the first."""
    for step in numbers:
        for place, matrix in enumerate(matrices):
            late = place == 1 and step == 0
            matrix.grad = None if late else seeded(*matrix.shape, seed=100 * step + place).to(matrix.dtype)
        optimizer.step()


@pytest.mark.parametrize("at_once", [muon.AT_ONCE, 1])
def test_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Six steps of high, wide and square matrices, all at once and one by one, beside torch.optim.Muon.

    Of a fused projection each third goes alone. Equal to a thousandth of the rate, which one rounding in bfloat16
    exceeds: the norm of several matrices at once may be summed in another order than that of one.
    """
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    matrices = parameters()
    theirs = [nn.Parameter(part.clone()) for one in matrices for part in one.detach().chunk(row_blocks(one))]
    reference = torch.optim.Muon(theirs, lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = ours(matrices)
    for step in range(6):
        steps(optimizer, matrices, range(step, step + 1))
        gradients = [
            part
            for one in matrices
            for part in ([None] if one.grad is None else one.grad.clone().chunk(row_blocks(one)))
        ]
        for one, gradient in zip(theirs, gradients, strict=True):
            one.grad = gradient
        reference.step()
    found = [part for one in matrices for part in one.detach().chunk(row_blocks(one))]
    assert len(found) == 10
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=RATE / 1000)


def test_singular_values_move_near_one() -> None:
    """In float64: the iteration applied to each singular value by itself, and the singular vectors kept, to 1e-10."""
    blocks = torch.stack([seeded(6, 9, seed=seed).double() for seed in range(3)])
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    values = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalise(blocks), u @ torch.diag_embed(values) @ v, rtol=0, atol=1e-10)
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def test_a_matrix_moves_by_what_adamw_moves_it_by() -> None:
    """The root mean square of an update is about 0.2 η whatever the shape (arXiv 2502.16982, section 2.2)."""
    for shape in ((64, 64), (64, 256), (192, 64)):
        matrix = nn.Parameter(torch.zeros(shape))
        matrix.grad = seeded(*shape)
        ours([matrix]).step()
        assert matrix.detach().square().mean().sqrt().item() == pytest.approx(0.2 * RATE, rel=0.25)


@pytest.mark.parametrize(
    ("values", "beside"),
    [
        (TINY, {"visual.proj", "visual.conv1.weight", "visual.positional_embedding"}),
        (RESNET, {"visual.attnpool.c_proj.weight", "visual.attnpool.positional_embedding"}),
    ],
    ids=["ViT", "ResNet"],
)
def test_what_goes_to_muon_by_name(values: dict[str, Any], beside: set[str]) -> None:
    """Attention and MLP of both towers; no embedding, no projection out of a tower, no convolution."""
    model = CLIP(config_from_dict(values))
    hidden = hidden_matrices(model)
    found = {name for name, parameter in model.named_parameters() if parameter in hidden}
    parts = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    parts += ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert found == {name for name, _ in model.named_parameters() if name.endswith(parts)}
    assert not found & (beside | {"text_projection", "token_embedding.weight", "positional_embedding"})
    assert {row_blocks(p) for n, p in model.named_parameters() if n.endswith("in_proj_weight")} == {3}


def test_groups_keep_rates_and_decay_apart() -> None:
    """Muon's first, at its own rate, on top of a tower's; each parameter once."""
    model = CLIP(config_from_dict(TINY))
    options = TrainingOptions.of(MUON | {"muon_learning_rate": 4e-3, "image_learning_rate": 5e-4})
    groups = build_optimizer(model, model, options).param_groups
    found = {(group["hidden"], group["weight_decay"], round(group["lr"], 6)): len(group["params"]) for group in groups}
    assert set(found) == {
        (True, DECAY, 4e-3), (True, DECAY, 2e-3),
        (False, DECAY, 1e-3), (False, DECAY, 5e-4), (False, 0.0, 1e-3), (False, 0.0, 5e-4),
    }  # fmt: skip
    assert [group["hidden"] for group in groups] == sorted((group["hidden"] for group in groups), reverse=True)
    assert sum(found.values()) == len(list(model.parameters()))
    without = build_optimizer(model, model, TrainingOptions.of(NUMBERS | {"optimizer": "adamw"}))
    assert not any("hidden" in group for group in without.param_groups)
    usual = build_optimizer(model, model, TrainingOptions.of(MUON))
    assert {group["lr"] for group in usual.param_groups} == {8e-3, 1e-3}


def test_it_is_refused_where_it_would_update_nothing(tmp_path: Path) -> None:
    """Both towers locked beside a projection that is trained; prompts. Of locked towers nothing is found."""
    module = CustomCLIPWrapper(image_tower(), bert(), image_size=SIDE, optimizer="muon", lock_image=True)
    groups = build_optimizer(module, module.model, module.options).param_groups
    found = {parameter for group in groups if group["hidden"] for parameter in group["params"]}
    assert found and not found & set(module.model.visual.parameters())
    message = "optimizer is 'muon', which updates the matrices inside the towers, and none of them is trained"
    with pytest.raises(UserError, match=message):
        CustomCLIPWrapper(
            image_tower(WIDTH + 1), bert(), project=True, image_size=SIDE, optimizer="muon",
            lock_image=True, lock_text=True,
        )  # fmt: skip
    write_model(CLIP(config_from_dict(TINY)), tmp_path / "clip.safetensors", "safetensors")
    with pytest.raises(UserError, match=message):
        PromptCLIPWrapper(
            tmp_path / "clip.safetensors", PromptConfig(2, (0,), 0.0, class_token=False), optimizer="muon"
        )


def made(model: CLIP, **how: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, model, TrainingOptions.of(MUON | how), fused=True)


def test_the_rest_is_adamw_to_the_bit() -> None:
    """Of a whole model: what Muon leaves alone has the bits of a fused AdamW beside it, and one schedule moves both."""
    models = [CLIP(config_from_dict(TINY))]
    models.append(copy.deepcopy(models[0]))
    groups = parameter_groups(models[1], OptimizerOptions(**NUMBERS), {})
    optimizer = made(models[0])
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in (optimizer, reference)]
    for step in range(3):
        for model in models:
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = seeded(*parameter.shape, seed=100 * step + place)
        for one, schedule in zip((optimizer, reference), schedules, strict=True):
            one.step()
            schedule.step()
    hidden = hidden_matrices(models[0])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other) == (one not in hidden)


@pytest.mark.parametrize("how", [{}, {"adam_statistics": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_restored_state_goes_on_to_the_same_bits(how: dict[str, Any]) -> None:
    """Two steps, the state through a dict into a new optimizer, two more: as four. Statistics keep their type."""
    models = [CLIP(config_from_dict(TINY))]
    optimizer = made(models[0], **how)
    steps(optimizer, list(models[0].parameters()), range(2))
    models.append(copy.deepcopy(models[0]))
    again = made(models[1], **how)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, model in zip((optimizer, again), models, strict=True):
        steps(one, list(model.parameters()), range(2, 4))
    assert isinstance(again, Muon)
    assert again.rest.state is again.state
    assert again.rest.param_groups[0] is again.param_groups[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    dtypes = {again.state[p][BUFFER].dtype for p in hidden_matrices(models[1])}
    assert dtypes == {torch.bfloat16 if how else torch.float32}


def test_what_is_rounded_by_chance_is_right_on_average() -> None:
    """One step from bfloat16's numbers, of 200 rounding seeds: the mean of weights and momentum is float32's step."""
    start, gradient = seeded(12, 16).bfloat16(), seeded(12, 16, seed=1).bfloat16()
    found: list[list[Tensor]] = [[], []]
    for seed in range(200):
        matrix = nn.Parameter(start.clone())
        optimizer = ours([matrix], half_momentum=True, seed=seed)
        matrix.grad = gradient
        optimizer.step()
        assert matrix.dtype == optimizer.state[matrix][BUFFER].dtype == torch.bfloat16
        found[0].append(matrix.detach().double())
        found[1].append(optimizer.state[matrix][BUFFER].double())
    wide = nn.Parameter(start.float())
    reference = ours([wide])
    wide.grad = gradient.float()
    reference.step()
    for values, expected in zip(found, (wide.detach(), reference.state[wide][BUFFER]), strict=True):
        step = 2.0 ** (expected.double().abs().log2().floor() - 7)
        off = (torch.stack(values).mean(dim=0) - expected) / step
        # Hoeffding: of 192 numbers one is off by more than 0.2 once in 10³ times.
        assert off.abs().max() < 0.2
        assert (torch.stack(values).std(dim=0) > 0).float().mean() > 0.5


def test_matrices_of_two_groups_are_rounded_each_by_its_own_chance() -> None:
    """Alike in all but the group that they are in, in bfloat16, they differ after a step, and in their momentum."""
    pair = [nn.Parameter(seeded(24, 24).bfloat16()) for _ in range(2)]
    rest = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    optimizer = Muon(
        [{"params": [matrix], "lr": RATE, "weight_decay": DECAY} for matrix in pair],
        rest,
        OptimizerOptions(**MUON, **HALF),
    )
    for matrix in pair:
        matrix.grad = seeded(24, 24, seed=1).bfloat16()
    optimizer.step()
    assert not torch.equal(*pair)
    assert not torch.equal(*(optimizer.state[matrix][BUFFER] for matrix in pair))


@pytest.mark.parametrize("shard", [(0,), ()], ids=["whole", "replica"])
def test_no_two_numbers_share_their_noise(monkeypatch: pytest.MonkeyPatch, shard: tuple[int, ...]) -> None:
    """A matrix and its momentum, and AdamW's weights and moments at the same place of their list, are rounded apart.

    Of a replica on a mesh too, whose key ends earlier: zeros at the end of a short key change nothing (NumPy).
    """
    drawn: list[Tensor] = []
    draw = half_adamw.draw

    def noted(*arguments: Any) -> Tensor:
        noise = draw(*arguments)
        drawn.extend(noise.unbind())
        return noise

    monkeypatch.setattr(half_adamw, "shard_of", lambda _: shard)
    for module in (half_adamw, muon):
        monkeypatch.setattr(module, "draw", noted)
    matrix, other = (nn.Parameter(seeded(24, 24).bfloat16()) for _ in range(2))
    options = OptimizerOptions(**MUON, **HALF)
    rest = half_adamw.HalfAdamW([{"params": [other]}], options)
    optimizer = Muon([{"params": [matrix], "lr": RATE, "weight_decay": DECAY}], rest, options)
    for one in (matrix, other):
        one.grad = seeded(24, 24, seed=1).bfloat16()
    optimizer.step()
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(drawn) == 5


def test_what_is_added_later_is_trained() -> None:
    """As a callback that unfreezes adds it: the other optimizer updates it, and its state is kept and restored."""
    matrix, later = nn.Parameter(seeded(6, 6)), nn.Parameter(seeded(6, 6, seed=1))
    optimizer = ours([matrix])
    optimizer.add_param_group({"params": [later], "lr": RATE})
    expected = copy.deepcopy(later)
    reference = torch.optim.AdamW([expected], lr=RATE, weight_decay=0.0)
    for step in range(2):
        if step:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        later.grad = seeded(6, 6, seed=2 + step)
        expected.grad = later.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(later, expected)
    assert len(optimizer.param_groups) == 3
    optimizer.param_groups[-1]["lr"] = 0.0  # as a schedule sets it
    optimizer.step()
    assert torch.equal(later, expected)


@pytest.mark.parametrize("waits", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_that_is_held_back_changes_nothing(monkeypatch: pytest.MonkeyPatch, waits: bool, half: bool) -> None:
    """``found_inf`` above 0 beside NaN in the gradient: matrices, momentum and the rest keep their bits."""
    monkeypatch.setattr(half_adamw, "known_at_once", lambda _: not waits)
    matrix, bias = nn.Parameter(seeded(6, 6)), nn.Parameter(seeded(4))
    rest = torch.optim.AdamW([bias], lr=RATE, fused=True)
    groups = [{"params": [matrix], "lr": RATE, "weight_decay": DECAY}]
    optimizer = Muon(groups, rest, OptimizerOptions(**MUON, **(HALF if half else {})), held_back=True)
    matrix.grad, bias.grad = seeded(6, 6, seed=1), seeded(4, seed=1)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()

    def kept() -> list[Tensor]:
        return [tensor.detach().clone() for tensor in (matrix, bias, optimizer.state[matrix][BUFFER])]

    before = kept()
    optimizer.found_inf = torch.ones(())
    matrix.grad[0, 0] = bias.grad[0] = math.nan
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, kept(), strict=True))
    # Where it is known at once the step was none; a GPU's is counted, and the run ends.
    assert optimizer.state[matrix]["step"] == 1 + waits
    optimizer.found_inf = torch.zeros(())
    matrix.grad, bias.grad = seeded(6, 6, seed=2), seeded(4, seed=2)
    optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, kept(), strict=True))
