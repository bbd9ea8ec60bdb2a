"""Fine-tuning on two gloo processes, each in micro-batches, against one process's plain backward pass, in float64.

Equal captions and a teacher need everyone's pairs; a rank minimises its own rows of both terms.

B  pairs on a rank      W  ranks      N  pairs of the global batch (W · B)
"""

from __future__ import annotations

import itertools
import os
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.training.tiny_encoders import SIDE, Pairs, bert, captions, image_tower, pixels
from train_clip.encoders.wrapper import CustomCLIPWrapper
from train_clip.gather import world

B, PROCESSES, STEPS = 6, 2, 4
KL_COEFF = 0.7
# Pairs that have the caption of another: on the same rank, and on the other one.
EQUAL = {3: 0, 7: 0, 11: 5, 8: 6}
LONGEST = 1


class Case(NamedTuple):
    """One objective: the target, what equal captions do, and rows of a chunk at most."""

    kind: str
    captions: str = "keep"
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.captions} {self.size}"


CASES = [
    Case(kind, captions, size)
    for kind in ("none", "softmax", "transport")
    for captions in ("keep", "mask")
    for size in (0, 4)
]


class Found(NamedTuple):
    """What a rank brings back: its loss, and DDP's gradients by the parameter's name."""

    loss: float
    gradients: dict[str, Tensor]


class Trained(NamedTuple):
    """A rank's state after some steps, and its losses."""

    state: dict[str, Any]
    losses: list[float]


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> list[tuple[dict[Case, Found], dict[str, Trained]]]:
    """What all tests look at, run once on each process: starting them is what takes time."""
    return run(run_everything, tmp_path_factory.mktemp("distillation"), PROCESSES)


def run_everything() -> tuple[dict[Case, Found], dict[str, Trained]]:
    return {case: step(case) for case in CASES}, {kind: train(kind) for kind in ("softmax", "transport")}


def build(case: Case, **how: Any) -> CustomCLIPWrapper:
    """The same module on every rank, its teacher moved away from it."""
    module = CustomCLIPWrapper(
        image_tower(), bert(), case.size, avg_word_embs=True, image_size=SIDE, kl_coeff=KL_COEFF,
        distillation=case.kind, equal_captions=case.captions, **how,
    ).double()  # fmt: skip
    for parameter in module.model.transformer.pooler.parameters():
        parameter.requires_grad_(False)
    if module.distillation is not None:
        generator = torch.Generator().manual_seed(6)
        for parameter in module.distillation.teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        nn.init.constant_(module.distillation.log_scale, 2.0)
    nn.init.constant_(module.model.logit_scale, 1.5)
    return module


def global_batch(num_batches: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and padded captions, some of them equal across ranks; several batches lie end to end."""
    images, texts = pixels(num_batches * PROCESSES * B), captions(num_batches * PROCESSES * B)
    # The longest caption is on the first rank, so that equal ones are padded to two lengths.
    texts["attention_mask"][:, 7:] = 0
    texts["attention_mask"][LONGEST] = 1
    texts["input_ids"] = torch.where(texts["attention_mask"] > 0, texts["input_ids"].clamp(min=4), 0)
    for place, other in EQUAL.items():
        for rows in texts.values():
            rows[place] = rows[other]
    return images, texts


class Step(nn.Module):
    """The module's own training step, as DDP wants it; what the step asks of a Trainer is left out."""

    def __init__(self, module: CustomCLIPWrapper) -> None:
        super().__init__()
        self.module = module
        module._log_step = lambda *_: None  # type: ignore[method-assign]

    def forward(self, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return self.module.training_step(batch, 0)


def step(case: Case) -> Found:
    """This rank's loss on its share, and the gradients that DDP averaged. The share's padding is its own."""
    rank = world()[0]
    images, texts = global_batch()
    own = slice(rank * B, (rank + 1) * B)
    longest = int(texts["attention_mask"][own].sum(dim=1).max())
    replica = DistributedDataParallel(Step(build(case)))
    loss = replica((images[own], {name: rows[own, :longest] for name, rows in texts.items()}))
    loss.backward()
    named = replica.module.module.named_parameters()
    return Found(loss.item(), {name: value.grad for name, value in named if value.grad is not None})


def train(kind: str) -> Trained:
    """Steps under Lightning's own DDP, which looks for no unused parameters; the pooler is one.

    The second rank's weights, teacher included, begin elsewhere, as random layers do without a seed.
    """
    rank = world()[0]
    images, texts = global_batch(STEPS)
    rows = torch.arange(len(images)).unflatten(0, (STEPS, PROCESSES, B))[:, rank].flatten()
    return fit(kind, 4, Pairs(images[rows], {name: value[rows] for name, value in texts.items()}), B, noise=rank)


def fit(kind: str, size: int, pairs: Pairs, batch_size: int, noise: float = 0) -> Trained:
    os.environ.setdefault("LOCAL_RANK", "0")
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(trainer.callback_metrics["train/loss"].item())

    module = CustomCLIPWrapper(
        image_tower(), bert(), size, 0.1, KL_COEFF, True, image_size=SIDE, distillation=kind, equal_captions="mask"
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += noise
    trainer = bare_trainer(precision="64-true", max_epochs=1, use_distributed_sampler=False, callbacks=[Losses()])
    trainer.fit(module, DataLoader(pairs, batch_size))
    return Trained(module.state_dict(), losses)


def reference(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the global batch in one piece, written out with PyTorch's own functions."""
    module = build(case._replace(size=0))
    images, texts = global_batch()
    sides = embed(module.model, images, texts)
    own = torch.arange(len(images))
    names = own.clone()
    for place, other in EQUAL.items():
        names[place] = names[other]
    left_out = (names[:, None] == names) & (own[:, None] != own)
    similarity = sides[0] @ sides[1].T
    scaled = module.model.logit_scale.exp() * similarity
    if case.captions == "mask":
        scaled = scaled.masked_fill(left_out, -torch.inf)
    loss = (F.cross_entropy(scaled, own) + F.cross_entropy(scaled.T, own)) / 2
    if module.distillation is not None:
        with torch.no_grad():
            v, t = embed(module.distillation.teacher.model, images, texts)
        same = v @ v.T + t @ t.T - 200 * torch.eye(len(v))
        for matrix, rows in ((same + v @ t.T, similarity), (same + t @ v.T, similarity.T)):
            target = (100 * matrix).softmax(dim=1) if case.kind == "softmax" else transport(matrix)
            student = (module.distillation.log_scale.exp() * rows).log_softmax(dim=1)
            entropy = torch.where(target > 0, target * target.clamp(min=1e-300).log(), 0.0).sum()
            loss = loss + KL_COEFF / 2 * (entropy - (target * student).sum()) / len(rows)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def transport(similarity: Tensor) -> Tensor:
    mass = (similarity / 0.15).exp()
    for _ in range(5):
        mass = mass / mass.sum(dim=1, keepdim=True)
        mass = mass / mass.sum(dim=0, keepdim=True)
    return mass / mass.sum(dim=1, keepdim=True)


def embed(model: Any, images: Tensor, texts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(value).double().view(3, 1, 1) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mask = texts["attention_mask"][:, :, None]
    hidden = model.transformer(**texts).last_hidden_state
    image = model.visual((images.double() / 255 - mean) / std)
    return F.normalize(image, dim=-1), F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_one_processs(everything, case):
    """Loss and DDP's gradient of every parameter, both temperatures included, on both ranks: 1e-12."""
    loss, gradients = reference(case)
    found = [cases[case] for cases, _ in everything]
    assert sum(each.loss for each in found) / len(found) == pytest.approx(loss, abs=1e-12)
    assert abs(found[0].loss - found[1].loss) > 1e-4
    assert ("distillation.log_scale" in gradients) == (case.kind != "none")
    for each in found:
        assert each.gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            if "key.bias" not in name:  # what attention's softmax does not see
                assert expected.abs().max() > 1e-6, name
            torch.testing.assert_close(
                each.gradients[name], expected, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_the_cases_differ(everything):
    """No two objectives have the same loss; chunks change none. The ranks' captions are padded to two lengths."""
    longest = global_batch()[1]["attention_mask"].sum(dim=1).unflatten(0, (PROCESSES, B)).amax(dim=1)
    assert longest[0] > longest[1]
    assert {place // B == other // B for place, other in EQUAL.items()} == {True, False}
    losses = {case: sum(cases[case].loss for cases, _ in everything) for case in CASES}
    whole = sorted(loss for case, loss in losses.items() if not case.size)
    assert min(b - a for a, b in itertools.pairwise(whole)) > 1e-3
    for case, loss in losses.items():
        assert loss == pytest.approx(losses[case._replace(size=0)], abs=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "transport"])
def test_teachers_stay_equal(everything, kind):
    """After four steps under Lightning's DDP both ranks hold the same bits, and one process's numbers to 1e-10.

    BERT's pooler takes no part in a mean over tokens. DDP fails on its second step where it waits for such a
    gradient, and these are four.
    """
    one, two = (trained[kind] for _, trained in everything)
    assert len(one.losses) == STEPS
    expected = fit(kind, 0, Pairs(*global_batch(STEPS)), PROCESSES * B)
    assert one.losses == pytest.approx(expected.losses, abs=1e-10)
    assert one.state.keys() == two.state.keys() == expected.state.keys()
    moved = 0
    for name, value in expected.state.items():
        if isinstance(value, Tensor):
            assert torch.equal(one.state[name], two.state[name]), name
            torch.testing.assert_close(one.state[name], value, rtol=0, atol=1e-10, msg=lambda m, name=name: name + m)
            student = expected.state.get(name.replace("distillation.teacher.model", "model"))
            moved += name.startswith("distillation.teacher") and not torch.equal(value, student)
        else:
            assert one.state[name] == two.state[name] == value == {"num_updates": STEPS}
    assert moved > 10
