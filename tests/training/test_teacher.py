"""The teacher against its formula, its temperature's bounds, and what the matrices of a batch weigh.

N  pairs of a batch      D  embedding width
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tests.training.tiny_encoders import SIDE, bare_trainer, bert, image_tower, loader
from train_clip.encoders.wrapper import CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.losses import Pairs
from train_clip.losses.distillation import divergence
from train_clip.losses.softmax import clip_loss, info_nce
from train_clip.training.ema import MATRICES, MOST_PAIRS, TEACHER_MOMENTUM, Distillation, WeightsEMA, require_room


def wrapper(norm: str = "batch", **how: Any) -> CustomCLIPWrapper:
    return CustomCLIPWrapper(image_tower(norm=norm), bert(0.1), avg_word_embs=True, image_size=SIDE, **how)


def jolt(model: nn.Module, generator: torch.Generator) -> None:
    """Move every weight and every buffer of floats, and count one batch."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += torch.randn(tensor.shape, generator=generator)
            else:
                tensor += 1


def test_the_mean_follows_by_the_formula():
    """A dozen updates: t ← m t + (1 - m) s, m = min(0.999, (1 + n) / (10 + n)), to 1e-12; buffers are copied."""
    student = wrapper().model.double()
    teacher, generator = WeightsEMA(student, TEACHER_MOMENTUM), torch.Generator().manual_seed(0)
    expected = {name: tensor.clone() for name, tensor in student.named_parameters()}
    for number in range(12):
        jolt(student, generator)
        momentum = min(0.999, (1 + number) / (10 + number))
        for name, tensor in student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * tensor.detach()
        teacher.follow(student)
        for name, tensor in teacher.model.named_parameters():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12, msg=lambda m, name=name: name + m)
        theirs = dict(student.named_buffers())
        assert any("running_var" in name for name in theirs)
        for name, tensor in teacher.model.named_buffers():
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.data_ptr() != theirs[name].data_ptr()
    assert teacher.num_updates == 12


@pytest.mark.parametrize("count", [8_980, 8_989, 8_990, 8_991, 10**6])
def test_momentum_stops_at_its_most(count):
    """(1 + n) / (10 + n) is 0.999 at n = 8,990: from there on a student that is 1 ahead moves the teacher by 0.001."""
    student = wrapper().model.double()
    teacher = WeightsEMA(student, TEACHER_MOMENTUM)
    teacher.num_updates = count
    before = teacher.model.visual.fc.weight.clone()
    with torch.no_grad():
        student.visual.fc.weight += 1
    teacher.follow(student)
    moved = (teacher.model.visual.fc.weight - before).mean().item()
    assert moved == pytest.approx(max(0.001, 9 / (10 + count)), rel=1e-9)


def test_the_student_is_left_alone():
    """To follow changes nothing of the student, and its weights are not the teacher's."""
    student = wrapper().model
    before = copy.deepcopy(student.state_dict())
    teacher = WeightsEMA(student, TEACHER_MOMENTUM)
    jolt(teacher.model, torch.Generator().manual_seed(0))
    teacher.follow(student)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_always_in_eval_mode_and_never_trained():
    """After ``module.train()`` and while it trains: no dropout, no BatchNorm of the batch, no gradient, no momentum."""
    module = wrapper()
    module.train()
    teacher = module.distillation.teacher
    seen: list[bool] = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append(any(part.training for part in teacher.modules()))
            assert all(parameter.grad is None for parameter in teacher.parameters())

    trainer = bare_trainer(callbacks=[Look()])
    trainer.fit(module, loader(12, 4))
    assert seen == [False] * 3
    assert module.model.visual.norm.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trained = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}
    assert id(module.distillation.log_scale) in trained
    assert len(trained) == sum(parameter.requires_grad for parameter in module.parameters())


def test_one_update_a_step_under_accumulation():
    """Six batches, three steps of two batches each: the teacher has followed three times."""
    module = wrapper()
    bare_trainer(accumulate_grad_batches=2).fit(module, loader(24, 4))
    assert module.distillation.teacher.num_updates == 3


def test_the_state_keeps_the_count_and_the_weights():
    """State dict round trip into a module of other weights: all tensors and the count, read as plain data."""
    first, second = wrapper(), wrapper()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        jolt(first.model, generator)
        first.distillation.after_update(first.model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.distillation.teacher.num_updates == 3
    for one, two in zip(first.distillation.teacher.parameters(), second.distillation.teacher.parameters(), strict=True):
        assert torch.equal(one, two)
    for module in (first, second):
        with torch.no_grad():
            module.model.visual.fc.weight.fill_(1)
        module.distillation.after_update(module.model)
    assert torch.equal(
        first.distillation.teacher.model.visual.fc.weight, second.distillation.teacher.model.visual.fc.weight
    )


def test_a_teacher_begins_with_its_student():
    """Also after ``begin_with``: every tensor of the state is the student's."""
    module = wrapper()
    weights = {name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor + 3
               for name, tensor in module.model.state_dict().items()}  # fmt: skip
    module.begin_with(weights, "a test")
    for name, tensor in module.distillation.teacher.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        assert torch.equal(module.model.state_dict()[name], weights[name]), name


def test_temperatures_start_at_their_place_and_stay_within_bounds():
    """Both logarithms start at 3.9 and are held in [0, ln 100] after an update, whatever it made of them."""
    module = wrapper()
    temperatures = module.distillation.log_scale, module.model.logit_scale
    for temperature in temperatures:
        assert temperature.item() == pytest.approx(3.9, abs=1e-6) and temperature.requires_grad
    for value, expected in ((7.0, math.log(100)), (-2.0, 0.0), (4.6, 4.6), (0.01, 0.01)):
        for temperature in temperatures:
            nn.init.constant_(temperature, value)
        module.model.clamp_temperature()
        module.distillation.after_update(module.model)
        for temperature in temperatures:
            assert temperature.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("start", "expected"), [(5.0, math.log(100)), (-3.0, 0.0)])
def test_temperatures_are_clamped_by_a_step(start, expected):
    """Under a Trainer, at a rate that moves them little: one step brings both back."""
    module = wrapper(learning_rate=1e-9)
    for temperature in (module.distillation.log_scale, module.model.logit_scale):
        nn.init.constant_(temperature, start)
    bare_trainer(max_steps=1).fit(module, loader(4, 4))
    for temperature in (module.distillation.log_scale, module.model.logit_scale):
        assert temperature.item() == pytest.approx(expected, abs=1e-4)
    # The teacher has the clamped value's mean, by the first momentum of 1/10.
    begun = 3.9
    assert module.distillation.teacher.model.logit_scale.item() == pytest.approx(0.1 * begun + 0.9 * expected, abs=1e-3)


def test_too_large_a_batch_is_refused():
    """Above the most pairs: a message that names gigabytes and what to do; at the most none."""
    require_room(MOST_PAIRS)
    with pytest.raises(
        UserError, match=rf"\d GiB on each process for a batch of {MOST_PAIRS + 1:,} pairs.*--batch_size"
    ):
        require_room(MOST_PAIRS + 1)
    module = wrapper()
    with pytest.raises(UserError, match="65,536 pairs"):
        module.require_batch_size(65_536)
    wrapper(distillation="none").require_batch_size(65_536)


def test_too_large_a_batch_is_refused_within_a_step(monkeypatch):
    """A user's own loader is met in the step itself, before anything of N² is made."""
    monkeypatch.setattr("train_clip.training.ema.MOST_PAIRS", 3)
    with pytest.raises(UserError, match="GiB on each process for a batch of 4 pairs"):
        bare_trainer().fit(wrapper(), loader(4, 4))


@pytest.mark.parametrize("masks", [False, True], ids=["keep", "mask"])
@pytest.mark.parametrize("kind", ["transport", "softmax"])
@pytest.mark.parametrize("num_pairs", [1024, 2048])
def test_matrices_are_counted(num_pairs, kind, masks):
    """What one process holds at its peak, in N² float32, by PyTorch's profiler: at most ``MATRICES``, and half of it.

    Loss and backward pass of both terms on embeddings of 16 numbers, after one run to warm up.
    """
    part = Distillation(wrapper().model, kind)
    torch.manual_seed(0)
    teachers = [F.normalize(torch.randn(num_pairs, 16), dim=-1) for _ in range(2)]
    students = [F.normalize(torch.randn(num_pairs, 16), dim=-1).requires_grad_() for _ in range(2)]
    numbers = torch.arange(num_pairs) // 2

    def step() -> None:
        pairs = Pairs(*students, *students, 0, numbers)
        scale = part.log_scale.exp()
        torch.stack([clip_loss(pairs, scale, mask_equal=masks), part(pairs, *teachers)]).sum().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    matrices = peak(profiler) / (4 * num_pairs**2)
    assert MATRICES / 2 < matrices <= MATRICES


def peak(profiler: Any) -> int:
    """Most bytes that were held at once."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_similarities_are_in_float32_under_autocast(monkeypatch):
    """Under bf16-mixed a product within the targets and the divergences is float32, for student and teacher alike."""
    module, dtypes = wrapper(), []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(rows: Tensor, columns: Tensor, *rest: Any) -> Any:
            dtypes.append((rows @ columns.T).dtype)
            return function(rows, columns, *rest)

        return call

    monkeypatch.setattr("train_clip.losses.distillation.divergence", spy(divergence))
    monkeypatch.setattr("train_clip.losses.softmax.info_nce", spy(info_nce))
    module.distillation._targets = spy(module.distillation._targets)
    bare_trainer(precision="bf16-mixed").fit(module, loader(4, 4))
    assert dtypes == [torch.float32] * 5


def test_the_term_is_the_mean_of_both_directions():
    """Against divergences written out in float64, at exp of the temperature and targets of the teacher alone: 1e-12."""
    part = Distillation(wrapper().model, "softmax").double()
    nn.init.constant_(part.log_scale, 1.5)
    generator = torch.Generator().manual_seed(0)

    def rows() -> Tensor:
        return F.normalize(torch.randn(6, 5, dtype=torch.float64, generator=generator), dim=-1)

    images, texts, teacher_images, teacher_texts = (rows() for _ in range(4))
    same = teacher_images @ teacher_images.T + teacher_texts @ teacher_texts.T - 200 * torch.eye(6)
    total = 0.0
    for own, others, across in (
        (images, texts, teacher_images @ teacher_texts.T),
        (texts, images, teacher_texts @ teacher_images.T),
    ):
        target = (100 * (same + across)).softmax(dim=1)
        student = (math.exp(1.5) * own @ others.T).softmax(dim=1)
        total += (target * (target.clamp(min=1e-300).log() - student.log())).sum().item() / 6 / 2
    found = part(Pairs(images, texts, images, texts), teacher_images, teacher_texts).item()
    assert found == pytest.approx(total, abs=1e-12)
