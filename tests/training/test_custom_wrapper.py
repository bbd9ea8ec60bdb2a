"""Fine-tuning of two encoders under a bare Trainer: against a loop by hand, locked, saved, resumed, refused.

The loop takes from the package nothing. Encoders are modules of a few hundred numbers.

B  pairs of a batch      N  pairs of the global batch, here the same      L  tokens
"""

from __future__ import annotations

import copy
import math
import re
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import train_clip
from tests.conftest import write_pairs
from tests.training.tiny_encoders import (
    CONTEXT,
    SIDE,
    VOCAB,
    WIDTH,
    Pairs,
    bare_trainer,
    bert,
    captions,
    image_tower,
    loader,
    pixels,
    save_text_model,
    tokenizer,
    vit,
)
from train_clip.checkpoints.own import read_checkpoint
from train_clip.encoders.tokenizer import PretrainedTokenizer
from train_clip.encoders.wrapper import CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.training.checkpoints import AtomicCheckpointIO, Checkpoints, Interval
from train_clip.training.data_module import TextImageDataModule

B = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels (torchvision's documentation)


def wrapper(image: nn.Module | None = None, text: nn.Module | None = None, **how: Any) -> CustomCLIPWrapper:
    how = {"avg_word_embs": True, "image_size": SIDE} | how
    return CustomCLIPWrapper(image_tower() if image is None else image, bert() if text is None else text, **how)


class Watch(L.Callback):
    """Losses of every batch, and the gradients of every step by the parameter's name."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        named = module.named_parameters()
        self.gradients.append({name: value.grad.clone() for name, value in named if value.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def fit(module: CustomCLIPWrapper, data: DataLoader[Any], **how: Any) -> Watch:
    watch = Watch()
    bare_trainer(callbacks=[watch], **how).fit(module, data)
    return watch


class ByHand(nn.Module):
    """A training loop in plain PyTorch: SGD with momentum 0.9 on a cosine, and a teacher.

    Args:
        image: the image encoder, copied.
        text: the BERT, copied.
        kind: of the target: ``transport``, ``softmax`` or ``none``.
        rate: at the peak.
        num_steps: of the run.
    """

    def __init__(self, image: nn.Module, text: nn.Module, kind: str, rate: float, num_steps: int) -> None:
        super().__init__()
        self.image, self.text = copy.deepcopy(image).double().train(), copy.deepcopy(text).double().train()
        self.log_scale = nn.Parameter(torch.tensor(3.9).double())
        self.taught = copy.deepcopy(nn.ModuleList([self.image, self.text])).requires_grad_(False).eval()
        self.log_scale_of_kl = nn.Parameter(torch.tensor(3.9).double())
        self.kind, self.rate, self.num_steps, self.steps, self.num_clamped = kind, rate, num_steps, 0, 0
        self.velocity: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def embed(self, image: nn.Module, text: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
        mean, std = (torch.tensor(value).double().view(3, 1, 1) for value in (MEAN, STD))
        hidden = text(**batch[1]).last_hidden_state
        means = [
            row[: int(mask.sum())].mean(dim=0) for row, mask in zip(hidden, batch[1]["attention_mask"], strict=True)
        ]
        sides = image((batch[0].double() / 255 - mean) / std), torch.stack(means)
        return [side / side.norm(dim=1, keepdim=True) for side in sides]

    def target(self, similarity: Tensor) -> Tensor:
        if self.kind == "softmax":
            return (100 * similarity).softmax(dim=1)
        mass = (similarity / 0.15).exp()
        for _ in range(5):
            mass = mass / mass.sum(dim=1, keepdim=True)
            mass = mass / mass.sum(dim=0, keepdim=True)
        return mass / mass.sum(dim=1, keepdim=True)

    def loss(self, batch: tuple[Tensor, dict[str, Tensor]], kl_coeff: float) -> Tensor:
        images, texts = self.embed(self.image, self.text, batch)
        similarity = images @ texts.T
        own = torch.arange(len(images))
        scaled = self.log_scale.exp() * similarity
        loss = (F.cross_entropy(scaled, own) + F.cross_entropy(scaled.T, own)) / 2
        if self.kind == "none":
            return loss
        with torch.no_grad():
            v, t = self.embed(*self.taught, batch)
            same = v @ v.T + t @ t.T - 200 * torch.eye(len(v))
            targets = [self.target(same + v @ t.T), self.target(same + t @ v.T)]
        for target, rows in zip(targets, (similarity, similarity.T), strict=True):
            student = (self.log_scale_of_kl.exp() * rows).log_softmax(dim=1)
            own_entropy = torch.where(target > 0, target * target.clamp(min=1e-300).log(), 0.0).sum()
            loss = loss + kl_coeff / 2 * (own_entropy - (target * student).sum()) / len(rows)
        return loss

    def step(self, batch: tuple[Tensor, dict[str, Tensor]], kl_coeff: float = 1.0) -> None:
        self.zero_grad()
        loss = self.loss(batch, kl_coeff)
        loss.backward()
        self.losses.append(loss.item())
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * self.steps / self.num_steps))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.grad is not None:
                    self.velocity[name] = 0.9 * self.velocity.get(name, 0) + parameter.grad
                    parameter -= rate * self.velocity[name]
            for temperature in (self.log_scale, self.log_scale_of_kl):
                self.num_clamped += int(not 0 <= temperature <= math.log(100))
                temperature.clamp_(0, math.log(100))
            momentum = min(0.999, (1 + self.steps) / (10 + self.steps))
            for own, theirs in zip(self.taught, (self.image, self.text), strict=True):
                for one, two in zip(own.parameters(), theirs.parameters(), strict=True):
                    one.copy_(momentum * one + (1 - momentum) * two)
                for one, two in zip(own.buffers(), theirs.buffers(), strict=True):
                    one.copy_(two)
        self.steps += 1


@pytest.mark.parametrize(("norm", "start"), [("layer", 3.875), ("batch", 2**-10)])
@pytest.mark.parametrize("kind", ["transport", "softmax", "none"])
def test_six_steps_by_hand(kind, norm, start):
    """Losses of six batches in two epochs, both temperatures, and every weight of student and teacher: 1e-10.

    In float64; captions of different lengths; temperatures near their usual start, and such that run into a bound.
    """
    image, text = image_tower(norm=norm), bert()
    module = wrapper(image, text, learning_rate=0.05, distillation=kind, kl_coeff=0.7)
    by_hand = ByHand(image, text, kind, 0.05, num_steps=6)
    temperatures = [module.model.logit_scale] + ([] if kind == "none" else [module.distillation.log_scale])
    for temperature in (*temperatures, by_hand.log_scale, by_hand.log_scale_of_kl):
        nn.init.constant_(temperature, start)
    watch = fit(module, loader(3 * B, B), max_epochs=2, precision="64-true")
    for _ in range(2):
        for batch in loader(3 * B, B):
            by_hand.step(batch, 0.7)
    assert (by_hand.num_clamped > 0) == (start < 1)
    assert watch.losses == pytest.approx(by_hand.losses, abs=1e-10)
    assert by_hand.losses[0] - by_hand.losses[-1] > 0.01
    pairs = [(module.model.logit_scale, by_hand.log_scale), *both(module.model, by_hand.image, by_hand.text)]
    if kind != "none":
        pairs += [(module.distillation.log_scale, by_hand.log_scale_of_kl)]
        pairs += both(module.distillation.teacher.model, *by_hand.taught)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def both(model: Any, image: nn.Module, text: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of a model's towers beside that of two encoders."""
    towers = (model.visual, image), (model.transformer, text)
    return [
        pair
        for one, two in towers
        for pair in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["transport", "softmax", "none"])
def test_micro_batches_give_the_whole_gradient(kind):
    """Chunks of 3 of 8 against the batch in one piece, every parameter, in float64: 1e-12.

    The teacher is not the student: it follows through two steps first.
    """
    found = []
    for size in (0, 3):
        module = wrapper(learning_rate=0.1, distillation=kind, minibatch_size=size)
        watch = fit(module, loader(3 * B, B), precision="64-true")
        found.append(watch)
    whole, chunks = found
    assert chunks.losses == pytest.approx(whole.losses, abs=1e-12)
    for one, two in zip(whole.gradients, chunks.gradients, strict=True):
        assert one.keys() == two.keys() and "model.logit_scale" in one
        assert ("distillation.log_scale" in one) == (kind != "none")
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, rtol=0, atol=1e-12, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("kind", ["transport", "none"])
@pytest.mark.parametrize("locked", ["image", "text"])
def test_a_locked_tower_stays_as_it_is(locked, kind):
    """Weights and running statistics bit for bit, eval mode in every step, no graph; the rest trains.

    The image encoder has BatchNorm, the text encoder dropout, and a projection joins them.
    """
    module = wrapper(
        image_tower(12, "batch"),
        bert(0.1),
        project=True,
        distillation=kind,
        minibatch_size=3,
        **{f"lock_{locked}": True},
    )
    tower = module.model.visual if locked == "image" else module.model.transformer
    before = copy.deepcopy(module.state_dict())
    seen: list[tuple[bool, bool]] = []

    def look(part: nn.Module, _: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output.last_hidden_state
        seen.append((any(each.training for each in part.modules()), tensor.requires_grad))

    handle = tower.register_forward_hook(look)
    bare_trainer(max_epochs=2).fit(module, loader(3 * B, B))
    handle.remove()
    # Once to find what is reached, then three chunks in each of three batches, and of images in the second epoch again:
    # nothing is recomputed, and no caption is encoded twice.
    assert seen == [(False, False)] * (1 + 9 + (9 if locked == "image" else 0))
    changed = {name for name, tensor in module.state_dict().items() if not same(tensor, before[name])}
    prefix = {"image": "model.visual.", "text": "model.transformer."}
    assert not [name for name in changed if name.startswith(prefix[locked])]
    other = prefix["text" if locked == "image" else "image"]
    assert [name for name in changed if name.startswith(other)]
    assert {"model.image_projection.weight", "model.logit_scale"} <= changed
    rest = module.model.visual if locked == "text" else module.model.transformer
    assert rest.training
    for name, parameter in tower.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, name


def same(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def test_both_towers_locked_train_the_projection():
    """What is left is the projection and the temperatures."""
    module = wrapper(image_tower(12), bert(), project=True, lock_image=True, lock_text=True)
    before = copy.deepcopy(module.model.state_dict())
    fit(module, loader(2 * B, B))
    changed = {name for name, tensor in module.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"image_projection.weight", "logit_scale"}


@pytest.mark.parametrize("kind", ["transport", "none"])
def test_nothing_to_train_is_refused(kind):
    """Both towers locked, of the same width, only temperatures left: an error, with a teacher or without."""
    with pytest.raises(UserError, match="Both towers are locked and there is no projection"):
        wrapper(project=True, lock_image=True, lock_text=True, distillation=kind)


class Skipping(nn.Module):
    """A tower whose last layer takes part in some steps only, as under stochastic depth."""

    def __init__(self, skip_first: bool) -> None:
        super().__init__()
        self.tower, self.last, self.skip = image_tower(), nn.Linear(WIDTH, WIDTH), not skip_first

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        self.skip = not self.skip if self.training else self.skip
        return features if self.training and self.skip else features + self.last(features)


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_layers_that_take_part_in_some_steps(optimizer, skip_first):
    """A layer without a gradient in the first step, or the second, trains in the others."""
    module = wrapper(Skipping(skip_first), optimizer=optimizer)
    before = module.model.visual.last.weight.clone()
    watch = fit(module, loader(4 * B, B))
    name = "model.visual.last.weight"
    assert [name in gradients for gradients in watch.gradients] == [not skip_first, skip_first] * 2
    assert not torch.equal(module.model.visual.last.weight, before)


def plain_groups(
    module: CustomCLIPWrapper, decay: float, image: float, text: float, rest: float
) -> list[dict[str, Any]]:
    """Each parameter in a group of its own."""
    groups = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = image if name.startswith("model.visual") else text if name.startswith("model.transformer") else rest
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay if parameter.ndim >= 2 else 0.0})
    return groups


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_tower_has_its_rate(optimizer):
    """Four steps against ``torch.optim`` with a group for each parameter, fed the same gradients: 1e-10 in float64."""
    how = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "momentum": 0.6, "learning_rate": 0.01}
    rates = {"image_learning_rate": 0.04, "text_learning_rate": 0.002}
    module = wrapper(image_tower(12), bert(), project=True, optimizer=optimizer, warmup_steps=2, **how, **rates)
    twin = copy.deepcopy(module).double()
    watch = fit(module, loader(4 * B, B), precision="64-true")
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        twin.model.transformer.get_parameter(name).requires_grad_(False)
    groups = plain_groups(twin, 0.1, 0.04, 0.002, 0.01)
    peaks = [group["lr"] for group in groups]
    if optimizer == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.6)
    else:
        reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)
    for number, gradients in enumerate(watch.gradients):
        share = (number + 1) / 2 if number < 2 else 0.5 * (1 + math.cos(math.pi * (number - 2) / 2))
        for group, peak in zip(reference.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients.get(name)
        reference.step()
    for name, parameter in twin.named_parameters():
        if "teacher" not in name:
            torch.testing.assert_close(
                module.get_parameter(name), parameter, rtol=0, atol=1e-10, msg=lambda m, name=name: name + m
            )


def test_what_the_loss_never_reaches_is_named_and_frozen(caplog):
    """BERT's pooler under a mean over tokens: named once with its count, frozen, not in the optimizer."""
    module = wrapper()
    with caplog.at_level("INFO"):
        watch = fit(module, loader(B, B))
    said = [record.getMessage() for record in caplog.records if "do not affect the loss" in record.getMessage()]
    assert len(said) == 1
    names = ["model.transformer.pooler.dense.weight", "model.transformer.pooler.dense.bias"]
    assert all(name.removeprefix("model.") in said[0] for name in names)
    assert f"2 tensors with {WIDTH * WIDTH + WIDTH:,} parameters" in said[0]
    frozen = [name for name, value in module.model.named_parameters("model") if not value.requires_grad]
    assert sorted(frozen) == sorted(names)
    assert not set(names) & set(watch.gradients[0])
    # Everything that is left has a gradient in a real batch.
    left = {name for name, value in module.named_parameters() if value.requires_grad}
    assert left == set(watch.gradients[0])


def test_a_pooler_that_is_used_trains():
    """With avg_word_embs=False the caption is the pooler's, and nothing is frozen."""
    module = wrapper(avg_word_embs=False)
    watch = fit(module, loader(B, B))
    assert watch.gradients[0]["model.transformer.pooler.dense.weight"].abs().max() > 0
    assert all(parameter.requires_grad for parameter in module.model.parameters())


def test_looking_for_what_is_reached_leaves_no_trace():
    """Modes, gradients, running statistics and random state are what they were before ``setup``."""
    module = wrapper(image_tower(norm="batch"), bert(0.1))
    module.model.transformer.encoder.layer[0].eval()
    modes = {name: part.training for name, part in module.named_modules()}
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    module.trainer = bare_trainer()
    module.setup("fit")
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(same(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["transport", "none"])
@pytest.mark.parametrize("mask", ["keep", "mask"])
def test_figures_of_a_batch_with_equal_captions(mask, kind):
    """Of eight captions three are equal, padded differently: the floor is 3/8 ln 3, or 0 where they are left out.

    The parts of the loss add up, and the mask lowers it.
    """
    texts = captions(B)
    for place in (4, 6):
        for rows in texts.values():
            rows[place] = rows[1]
    texts["input_ids"][6] += 9 * (1 - texts["attention_mask"][6])
    batch = DataLoader(Pairs(pixels(B), texts), B)
    figures = {}
    for each in ("keep", "mask"):
        trainer = bare_trainer()
        trainer.fit(wrapper(equal_captions=each, distillation=kind, kl_coeff=0.5), batch)
        figures[each] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    found = figures[mask]
    contrastive = found["train/contrastive_loss"] if kind != "none" else found["train/loss"]
    floor = 0.0 if mask == "mask" else 3 / 8 * math.log(3)
    assert found["train/loss_above_floor"] == pytest.approx(contrastive - floor, abs=1e-5)
    if kind != "none":
        assert found["train/loss"] == pytest.approx(contrastive + found["train/distillation_loss"], rel=1e-6)
        assert found["train/distillation_loss"] > 0
        assert found["train/distillation_scale"] == pytest.approx(math.exp(3.9), rel=1e-2)
    assert figures["mask"]["train/loss"] < figures["keep"]["train/loss"]


@pytest.mark.parametrize("average", [True, False])
def test_padding_changes_nothing(average):
    """Four more columns of padding, of any token: embeddings to 1e-12 in float64; and a mean by hand."""
    module = wrapper(avg_word_embs=average).double().eval()
    texts = captions(B)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    wider = {"input_ids": F.pad(ids, (0, 4), value=7), "attention_mask": F.pad(mask, (0, 4))}
    with torch.no_grad():
        short, long = module.model.encode_text(texts), module.model.encode_text(wider)
        torch.testing.assert_close(short, long, rtol=0, atol=1e-12)
        encoder = module.model.transformer
        for place, length in enumerate(mask.sum(dim=1).tolist()):
            alone = encoder(input_ids=ids[place : place + 1, :length])
            expected = alone.last_hidden_state[0].mean(dim=0) if average else alone.pooler_output[0]
            torch.testing.assert_close(short[place], expected, rtol=0, atol=1e-12)


def test_padding_changes_no_step():
    """A step on wider batches: the same loss and gradients, 1e-12 in float64, in micro-batches too."""
    found = []
    for columns in (0, 5):
        texts = {name: F.pad(rows, (0, columns)) for name, rows in captions(B).items()}
        module = wrapper(minibatch_size=3)
        found.append(fit(module, DataLoader(Pairs(pixels(B), texts), B), precision="64-true"))
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-12)
    for name, gradient in found[0].gradients[0].items():
        torch.testing.assert_close(found[1].gradients[0][name], gradient, rtol=0, atol=1e-12)


def test_widths_that_differ():
    """Refused with both ways out, each of which works."""
    with pytest.raises(UserError, match=r"gives 12 dimensions, the text encoder 16.*Linear\(12, 16\).*project=True"):
        wrapper(image_tower(12))
    module = wrapper(image_tower(12), project=True)
    assert module.model.image_projection.weight.shape == (WIDTH, 12)
    assert module.model.image_projection.bias is None
    assert isinstance(wrapper(project=True).model.image_projection, nn.Identity)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"image": nn.Linear(5, 16)}, UserError, r"Linear fails on an image of 8 × 8 pixels"),
        ({"image": nn.Conv2d(3, 16, 4)}, UserError, r"output has the shape \(2, 16, 5, 5\)"),
        ({"text": nn.Linear(5, 16)}, UserError, r"Linear fails on input_ids and attention_mask"),
        ({"temperature": 3}, TypeError, r"Unknown argument 'temperature'"),
        ({"optimizer": "lion"}, UserError, r"optimizer is 'lion'; expected one of adamw, sgd"),
        ({"distillation": "ot"}, UserError, r"distillation is 'ot'; expected one of transport, softmax, none"),
        ({"equal_captions": True}, UserError, r"equal_captions is True; expected one of keep, mask"),
        ({"kl_coeff": -1.0}, UserError, r"kl_coeff is -1\.0"),
        ({"momentum": 1.0}, UserError, r"momentum is 1\.0"),
        ({"image_learning_rate": 0.0}, UserError, r"image_learning_rate is 0\.0.*lock_image"),
        ({"text_learning_rate": -1.0}, UserError, r"text_learning_rate is -1\.0.*lock_text"),
        ({"minibatch_size": -1}, UserError, r"minibatch_size is -1; expected 0 or above"),
        ({"kept_minibatches": -1}, UserError, r"kept_minibatches is -1; expected 0 or above"),
        ({"gradient_checkpointing": -1}, UserError, r"gradient_checkpointing is -1; expected 0 or above"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_refused(how, error, message):
    """Encoders and arguments, each with what was found and what was expected."""
    with pytest.raises(error, match=message):
        wrapper(**how)


@pytest.mark.parametrize("missing", [0, 1])
def test_an_encoder_that_is_missing(missing):
    """None in the place of either: the argument is named."""
    encoders: list[Any] = [image_tower(), bert()]
    encoders[missing] = None
    with pytest.raises(UserError, match=rf"The {('image', 'text')[missing]}_encoder is missing"):
        CustomCLIPWrapper(*encoders, image_size=SIDE)


def test_an_image_encoder_for_another_size():
    """A ViT for 8 pixels that is given none of them: the size it was tried with is said."""
    with pytest.raises(UserError, match=r"ViTModel fails on an image of 224 × 224 pixels"):
        CustomCLIPWrapper(vit(), bert())


def test_hugging_face_encoders_are_built_again(tmp_path):
    """Saved as plain data and loaded without an argument, the data module's tokenizer too: embeddings bit for bit."""
    folder = numbered_pairs(tmp_path / "pairs", 8)
    module = CustomCLIPWrapper(vit(), bert(), avg_word_embs=True, image_size=SIDE, pixel_mean=(0.5, 0.4, 0.3))
    data = TextImageDataModule(folder, 4, image_size=SIDE, custom_tokenizer=tokenizer(), val_share=0.0)
    trainer = bare_trainer()
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert "state_dict" in torch.load(tmp_path / "a.ckpt", weights_only=True)
    loaded = CustomCLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    assert torch.equal(loaded.embed_images(pixels(5)), module.embed_images(pixels(5)))
    texts = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5 w4"]
    assert torch.equal(loaded.embed_texts(texts), module.embed_texts(texts))
    assert dict(loaded.hparams) == dict(module.hparams)
    for name, tensor in module.state_dict().items():
        assert same(loaded.state_dict()[name], tensor), name


def test_modules_of_ones_own_are_given_again(tmp_path):
    """Without them an error that says which argument; with fresh ones the embeddings are the same, bit for bit."""
    module = wrapper(tokenizer=tokenizer())
    trainer = bare_trainer()
    trainer.fit(module, loader(B, B))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert "state_dict" in torch.load(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(UserError, match=re.escape("load_from_checkpoint(path, image_encoder=…)")):
        CustomCLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(9)
    fresh = image_tower()
    nn.init.normal_(fresh.fc.weight)
    loaded = CustomCLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt", image_encoder=fresh)
    assert torch.equal(loaded.embed_images(pixels(5)), module.embed_images(pixels(5)))
    assert torch.equal(loaded.embed_texts(["w1 w2"]), module.embed_texts(["w1 w2"]))


class WithBatch:
    """A tokenizer that has ``batch`` and nothing else."""

    def __init__(self) -> None:
        self.batch = PretrainedTokenizer(tokenizer(), CONTEXT).batch


@pytest.mark.parametrize("place", ["module", "data module"])
def test_a_tokenizer_of_ones_own_is_given_again(place, tmp_path, caplog):
    """It trains, in either place; a line says that the checkpoint does not hold it; loading with it: equal."""
    caplog.set_level("INFO")
    given = {"tokenizer": WithBatch()} if place == "module" else {}
    module = CustomCLIPWrapper(vit(), bert(), avg_word_embs=True, image_size=SIDE, **given)
    folder = numbered_pairs(tmp_path / "pairs", 8)
    data = TextImageDataModule(folder, 4, image_size=SIDE, custom_tokenizer=WithBatch(), val_share=0.0)
    trainer = bare_trainer(max_steps=1)
    trainer.fit(module, data)
    assert "does not say how to build the tokenizer that you passed" in caplog.text
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(UserError, match=r"The tokenizer is missing: .*tokenizer=…"):
        train_clip.load(tmp_path / "a.ckpt")
    loaded = CustomCLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt", tokenizer=WithBatch())
    assert torch.equal(loaded.embed_texts(["w1 w2"]), module.embed_texts(["w1 w2"]))


def numbered_pairs(folder: Path, number: int) -> Path:
    """Pictures of noise with captions that differ."""
    write_pairs(folder, number)
    for place, file in enumerate(sorted(folder.glob("*.txt"))):
        file.write_text(f"w{place} w{place % 3}\nw{place % 7} w1 w2 w{place}\n")
    return folder


def train(run: Path, data: Path, kind: str, resume: Path | None = None) -> list[float]:
    """Train for two epochs of four batches with BatchNorm, dropout and micro-batches, every state saved."""
    watch = Watch()
    saving = Checkpoints(run, Interval(steps=1), keep=99)
    trainer = bare_trainer(
        callbacks=[watch, saving], plugins=[AtomicCheckpointIO()], max_epochs=2, enable_checkpointing=True
    )
    module = wrapper(
        image_tower(12, "batch"), bert(0.1), project=True, minibatch_size=3, distillation=kind, learning_rate=0.05
    )
    torch.manual_seed(99 if resume else 1)  # a new process stands elsewhere
    pairs = TextImageDataModule(data, 4, image_size=SIDE, custom_tokenizer=tokenizer(), val_share=0.0)
    trainer.fit(module, pairs, ckpt_path=resume, weights_only=True)
    return watch.losses


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}/{name}")
    else:
        yield path, value


@pytest.mark.parametrize("kind", ["transport", "softmax"])
def test_resumed_with_its_teacher(tmp_path, kind):
    """Gone on from within each epoch and from their edge: losses and the whole state, bit for bit."""
    data = numbered_pairs(tmp_path / "data", 18)
    whole = train(tmp_path / "whole", data, kind)
    expected = dict(leaves(read_checkpoint(tmp_path / "whole" / "last.ckpt")))
    assert any("teacher" in name and "running_mean" in name for name in expected)
    for step in (1, 4, 6):
        rest = train(tmp_path / f"{step}", data, kind, tmp_path / "whole" / f"step-{step:08}.ckpt")
        assert rest == whole[step:]
        found = dict(leaves(read_checkpoint(tmp_path / f"{step}" / "last.ckpt")))
        assert found["/state_dict/distillation.teacher._extra_state/num_updates"] == 8
        for name, value in expected.items():
            if name.startswith(("/state_dict", "/optimizer_states", "/lr_schedulers", "/global_step")):
                assert same(found[name], value), name


class ResNet(nn.Module):
    """In the place of torchvision's: 2,048 numbers go into a layer that is called ``fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 32, stride=32)
        self.bn = nn.BatchNorm2d(8)
        self.wide = nn.Linear(8, 2048)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.wide(self.bn(self.conv(images)).mean(dim=(2, 3))))


@pytest.fixture
def declutr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text model of width 768 in the place of "johngiorgi/declutr-sci-base", with its tokenizer."""
    config = transformers.BertConfig(
        hidden_size=768, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    folder = save_text_model(tmp_path / "declutr")
    transformers.BertModel(config).save_pretrained(folder)

    def local(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(name: str, *arguments: Any, **how: Any) -> Any:
            assert name == "johngiorgi/declutr-sci-base"
            return original(folder, *arguments, **how)

        return from_pretrained

    for kind in (transformers.AutoModel, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", local(kind.from_pretrained))


def readme(folder: Path, hparams: Namespace, batch_size: int) -> CustomCLIPWrapper:
    """The example of train-CLIP's README, word for word but for its first line of imports and the trainer's options."""
    from torchvision.models import resnet50
    from transformers import AutoModel, AutoTokenizer

    img_encoder = resnet50(pretrained=True)
    img_encoder.fc = torch.nn.Linear(2048, 768)

    tokenizer = AutoTokenizer.from_pretrained("johngiorgi/declutr-sci-base")
    txt_encoder = AutoModel.from_pretrained("johngiorgi/declutr-sci-base")

    model = CustomCLIPWrapper(img_encoder, txt_encoder, hparams.minibatch_size, avg_word_embs=True)
    dm = TextImageDataModule(folder, batch_size, custom_tokenizer=tokenizer)
    trainer = bare_trainer(max_epochs=3)
    trainer.fit(model, dm)
    return model


def test_the_example_of_train_clips_readme(tmp_path, monkeypatch, declutr):
    """It trains, and the model embeds pictures and captions afterwards; the encoders are in training mode."""
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    models = types.ModuleType("torchvision.models")
    models.resnet50 = lambda pretrained: ResNet()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    before = transformers.AutoModel.from_pretrained("johngiorgi/declutr-sci-base").state_dict()
    model = readme(numbered_pairs(tmp_path / "pairs", 6), Namespace(minibatch_size=2), 4)
    assert model.model.visual.training and model.model.transformer.training
    assert model.model.visual.bn.num_batches_tracked == 3
    after = model.model.transformer.state_dict()
    assert not torch.equal(after["embeddings.word_embeddings.weight"], before["embeddings.word_embeddings.weight"])
    assert model.embed_images(tmp_path / "pairs" / "000.png").shape == (1, 768)
    assert model.embed_texts(["w1", "w2 w3"]).shape == (2, 768)
    assert model.hparams.text_encoder["name"].endswith("declutr")


@pytest.mark.gpu
def test_the_same_with_torchvision(tmp_path, monkeypatch, declutr):
    """With torchvision's own ResNet-50, without its pretrained weights, which lie behind a network."""
    models = pytest.importorskip("torchvision.models")
    original = models.resnet50
    monkeypatch.setattr(models, "resnet50", lambda pretrained: original(weights=None))
    model = readme(numbered_pairs(tmp_path / "pairs", 6), Namespace(minibatch_size=2), 4)
    assert model.embed_images(tmp_path / "pairs" / "000.png").shape == (1, 768)


def test_clips_tokens_do_not_go_into_another_encoder(tmp_path):
    """A data module with CLIP's tokenizer is refused, whether the vocabulary would hold its ids or not."""
    text = transformers.RobertaModel(
        transformers.RobertaConfig(
            hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50_265
        )
    )
    module = CustomCLIPWrapper(image_tower(), text, avg_word_embs=True, image_size=SIDE)
    data = TextImageDataModule(write_pairs(tmp_path / "pairs", 8), 4, image_size=SIDE, val_share=0.0)
    with pytest.raises(UserError, match=r"has CLIP's tokenizer; expected the text encoder's own: .*custom_tokenizer"):
        bare_trainer(max_steps=1).fit(module, data)


@pytest.mark.parametrize("change", ["activation", "layers", "none"])
def test_an_encoder_that_was_changed_is_the_users_own(change):
    """A Hugging Face module is described only where the description makes this very module."""
    encoder = vit()
    if change == "activation":
        encoder.pooler.activation = nn.Identity()
    elif change == "layers":
        encoder.layernorm = nn.Sequential(encoder.layernorm, nn.Linear(WIDTH, WIDTH))
    module = CustomCLIPWrapper(encoder, bert(), avg_word_embs=True, image_size=SIDE)
    assert (module.hparams["image_encoder"] is None) == (change != "none")


def test_half_precision_modules_train_in_float32():
    """As files of half precision do; in true half precision the teacher would stand still, which is refused."""
    module = CustomCLIPWrapper(image_tower(), bert().to(torch.bfloat16), avg_word_embs=True, image_size=SIDE)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="an EMA of the weights, and so the teacher, would not change"):
        bare_trainer(max_steps=1, precision="bf16-true").fit(module, loader(B, B))


def test_a_mixture_of_experts_is_reached():
    """The trial's captions differ, so that experts that would see other tokens are not taken for unused."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=VOCAB, num_experts=4
    )
    text = transformers.SwitchTransformersEncoderModel(config)
    module = CustomCLIPWrapper(image_tower(), text, avg_word_embs=True, image_size=SIDE)
    module.trainer = bare_trainer(max_steps=1)
    module.setup("fit")
    frozen = [name for name, parameter in module.model.named_parameters() if not parameter.requires_grad]
    assert not [name for name in frozen if "expert" in name]


@pytest.mark.parametrize(
    ("encoders", "how", "expected"),
    [
        (("hf:name", None), {}, r"image_encoder is a str; expected a torch\.nn\.Module, or what .*load_image_encoder"),
        ((None, None), {}, "image_encoder is missing"),
        (
            (image_tower(), bert()),
            {"pixel_mean": [0.5]},
            r"pixel_mean and pixel_std are \[0.5\] .*expected three",
        ),
        ((image_tower(), bert()), {"betas": [0.9]}, "expected two numbers"),
    ],
)
def test_arguments_that_cannot_be(encoders, how, expected):
    """Each with a message that says what to give."""
    with pytest.raises(UserError, match=expected):
        CustomCLIPWrapper(*encoders, avg_word_embs=True, image_size=SIDE, **how)
