"""Training with the sigmoid loss: what it begins with, its gradient, its figures, and the bias on its way to a file."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import train_clip
from tests.conftest import TINY
from tests.training.tiny_encoders import SIDE, bert, image_tower
from train_clip import CLIPWrapper, CustomCLIPWrapper, PromptCLIPWrapper, Tokenizer
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.losses import Pairs
from train_clip.losses.softmax import clip_loss
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.prompts.file import PromptConfig

B = 8
CAPTIONS = [f"picture {number % 6}" for number in range(B)]  # two are there twice
PIXELS = torch.randint(256, (B, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TOKENS = Tokenizer(16)(CAPTIONS)
EQUAL = torch.tensor([[one == other for other in CAPTIONS] for one in CAPTIONS])


def loader(size: int = B) -> DataLoader[Any]:
    return DataLoader(list(zip(PIXELS, TOKENS, strict=True)), batch_size=size)


def wrapper(**how: Any) -> CLIPWrapper:
    torch.manual_seed(0)
    return CLIPWrapper("tiny", TINY, **({"loss": "sigmoid"} | how))


def trainer(**how: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(enable_model_summary=False, log_every_n_steps=1, **({"max_epochs": 1} | quiet | how))


def naive(logits: Tensor, masked: bool = False) -> Tensor:
    """-1/N Σ_ij ln σ(z_ij logits_ij); the other pairs of an equal caption left out, if that is asked for."""
    own = torch.eye(len(logits), dtype=torch.bool)
    terms = torch.where(own, -F.logsigmoid(logits), -F.logsigmoid(-logits))
    return terms[~EQUAL[: len(own), : len(own)] | own].sum() / len(own) if masked else terms.sum() / len(own)


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.found = {name: parameter.grad.clone() for name, parameter in module.model.named_parameters()}


@pytest.mark.parametrize("captions", ["keep", "mask"])
@pytest.mark.parametrize("size", [0, 3])
def test_gradient_in_micro_batches(size, captions):
    """Of every parameter, against one plain backward pass through ``model(images, texts)``, in float64: 1e-12."""
    module, gradients = wrapper(minibatch_size=size, equal_captions=captions), Gradients()
    torch.nn.init.constant_(module.model.logit_bias, -1.0)
    module.double()
    loss = naive(module(PIXELS, TOKENS)[0], captions == "mask")
    expected = torch.autograd.grad(loss, list(module.model.parameters()))
    running = trainer(precision="64-true", callbacks=[gradients])
    running.fit(module, loader())
    assert running.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert {"logit_scale", "logit_bias"} <= set(gradients.found)
    for own, other in zip(gradients.found.values(), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_what_it_begins_with():
    """From scratch at log 10 and -10; the bias does not decay and has the rate of what is in neither tower."""
    module = wrapper(image_learning_rate=1e-5, text_learning_rate=1e-6, weight_decay=0.3)
    assert module.model.logit_scale.item() == pytest.approx(math.log(10))
    assert module.model.logit_bias.item() == -10
    assert CLIPWrapper("tiny", TINY).model.logit_bias is None
    running = trainer()
    running.fit(module, loader())
    (group,) = [
        group
        for group in running.optimizers[0].param_groups
        if any(p is module.model.logit_bias for p in group["params"])
    ]
    assert group["weight_decay"] == 0 and group["initial_lr"] == TINY["optimizer"]["lr"]
    assert running.callback_metrics["train/logit_bias"].item() == pytest.approx(-10, abs=0.01)


def test_the_scale_is_clamped_at_100():
    module = wrapper()
    torch.nn.init.constant_(module.model.logit_scale, 7.0)
    trainer().fit(module, loader())
    assert module.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("captions", ["keep", "mask"])
def test_figures(captions):
    """Validation in batches of 8 and of 3: the loss that is trained; and what it is above its floor.

    Equal captions: two of 8 twice, so that for 4 rows one yes and one no share a logit, 2 ln 2 at the least.
    """
    module = wrapper(equal_captions=captions, learning_rate=1e-9)
    for size in (B, 3):
        running = trainer()
        running.fit(module, loader(), loader(size))
        found = {name: value.item() for name, value in running.callback_metrics.items()}
        with torch.no_grad():
            logits = module(PIXELS, TOKENS)[0]
        parts = [logits[start : start + size, start : start + size] for start in range(0, B, size)]
        expected = sum(naive(part).item() * len(part) for part in parts) / B
        assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
        floor = 4 / B * 2 * math.log(2)
        # Equal captions never meet in a batch of 3.
        val_floor = floor if size == B else 0
        assert found["val/loss_above_floor"] == pytest.approx(expected - val_floor, rel=1e-5)
        trained = naive(logits, captions == "mask").item()
        assert found["train/loss"] == pytest.approx(trained, rel=1e-4)
        assert found["train/loss_above_floor"] == pytest.approx(trained - floor * (captions == "keep"), rel=1e-4)
        assert 0 <= found["train/accuracy_image_to_text"] <= 1


def test_distillation_is_added():
    """Two encoders: the sigmoid loss plus the term of the teacher; each is what it is alone."""
    how = {"avg_word_embs": True, "image_size": SIDE, "loss": "sigmoid", "learning_rate": 1e-9}
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (B, 6))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = torch.randn(B, 3, SIDE, SIDE)
    batch = DataLoader([(images, texts)], batch_size=None)
    losses = {}
    for kind in ("none", "transport"):
        module = CustomCLIPWrapper(image_tower(), bert(), **how, distillation=kind)
        running = trainer()
        running.fit(module, batch)
        losses[kind] = {name: value.item() for name, value in running.callback_metrics.items()}
    with torch.no_grad():
        module.eval()
        expected = naive(module(images, texts)[0]).item()
    found = losses["transport"]
    assert losses["none"]["train/loss"] == pytest.approx(expected, rel=1e-3)
    assert found["train/contrastive_loss"] == pytest.approx(losses["none"]["train/loss"], rel=1e-5)
    assert found["train/loss"] == pytest.approx(
        found["train/contrastive_loss"] + found["train/distillation_loss"], rel=1e-5
    )
    assert found["train/distillation_loss"] > 0


@pytest.fixture
def of_softmax() -> dict[str, Tensor]:
    """Weights as the softmax loss leaves them: a scale of 100."""
    torch.manual_seed(3)
    model = CLIP(config_from_dict(TINY))
    torch.nn.init.constant_(model.logit_scale, math.log(100))
    return model.state_dict()


def test_weights_of_the_other_loss(of_softmax, caplog):
    """Of the softmax: both begin as from scratch. With a bias: both are kept. With one, for the softmax: left out."""
    caplog.set_level(logging.INFO)
    module = wrapper(distillation="softmax")
    module.begin_with(of_softmax, "FILE")
    for model in (module.model, module.distillation.teacher.model):
        assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
        assert torch.equal(model.text_projection, of_softmax["text_projection"])
    assert "FILE: has no logit_bias" in caplog.text and "at a scale of 10 and at -10" in caplog.text
    caplog.clear()
    with_bias = of_softmax | {"logit_bias": torch.tensor(-12.5)}
    module.begin_with(with_bias, "FILE")
    assert module.model.logit_bias.item() == -12.5 and module.model.logit_scale.exp().item() == pytest.approx(100)
    assert caplog.text == ""
    plain = wrapper(loss="softmax")
    plain.begin_with(with_bias, "FILE")
    assert "FILE: its logit_bias" in caplog.text
    assert plain.model.logit_bias is None and plain.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_run_goes_on_with_its_own_loss_alone(tmp_path):
    """One that began before there was a choice has the softmax; another loss is refused by both values."""
    running = trainer()
    running.fit(wrapper(), loader())
    running.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UserError, match="loss softmax, was sigmoid"):
        trainer(max_epochs=2).fit(wrapper(loss="softmax"), loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    earlier = {name: value for name, value in wrapper(loss="softmax").hparams.items() if name != "loss"}
    assert "logit_bias" not in earlier["config"] and wrapper().hparams["config"]["logit_bias"] is True
    wrapper(loss="softmax").require_same_model(earlier)
    with pytest.raises(UserError, match="loss sigmoid, was softmax"):
        wrapper().require_same_model(earlier)


def test_the_checkpoint_loads(tmp_path):
    """By load_from_checkpoint and by train_clip.load, strictly, with the same logits."""
    running, module = trainer(max_epochs=3), wrapper()
    running.fit(module, loader())
    running.save_checkpoint(tmp_path / "one.ckpt")
    found = [
        CLIPWrapper.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True).model,
        train_clip.load(tmp_path / "one.ckpt").model,
    ]
    with torch.no_grad():
        expected = module(PIXELS, TOKENS)[0]
        for model in found:
            assert torch.equal(model(PIXELS, TOKENS)[0], expected)
            assert torch.equal(model.logit_bias, module.model.logit_bias)
    assert (expected < -1).all()


def test_two_encoders_are_built_again(tmp_path):
    """The checkpoint says by its loss that there is a bias."""
    torch.manual_seed(0)
    how = {"avg_word_embs": True, "image_size": SIDE, "loss": "sigmoid", "distillation": "none"}
    module = CustomCLIPWrapper(image_tower(), bert(), **how)
    torch.nn.init.constant_(module.model.logit_bias, -7.0)
    running = trainer()
    running.strategy.connect(module)
    running.save_checkpoint(tmp_path / "one.ckpt")
    image, text = image_tower(), bert()
    found = CustomCLIPWrapper.load_from_checkpoint(
        tmp_path / "one.ckpt", image_encoder=image, text_encoder=text, weights_only=True
    )
    assert found.model.logit_bias.item() == -7


def test_prompts_beside_a_backbone(tmp_path):
    """With a bias the sigmoid loss, temperature and bias as they are; without one it is refused."""
    prompts = PromptConfig(2, (0,), 0.0, class_token=False)
    for name, config in (("with", TINY | {"logit_bias": True}), ("without", TINY)):
        write_model(CLIP(config_from_dict(config)), tmp_path / f"{name}.safetensors", "safetensors")
    with pytest.raises(UserError, match="has no logit_bias"):
        PromptCLIPWrapper(tmp_path / "without.safetensors", prompts, loss="sigmoid")
    module = PromptCLIPWrapper(tmp_path / "with.safetensors", prompts, loss="sigmoid")
    running = trainer()
    running.fit(module, loader())
    assert module.model.logit_bias.item() == -10
    running.save_checkpoint(tmp_path / "prompts.ckpt")
    model = train_clip.load(tmp_path / "prompts.ckpt").model
    with torch.no_grad():
        assert torch.equal(model(PIXELS, TOKENS)[0], module.eval()(PIXELS, TOKENS)[0])
    # By the softmax loss, beside the same backbone.
    plain = PromptCLIPWrapper(tmp_path / "with.safetensors", prompts, learning_rate=1e-9)
    running = trainer()
    running.fit(plain, loader())
    with torch.no_grad():
        sides = [
            F.normalize(side, dim=-1) for side in (plain.model.encode_image(PIXELS), plain.model.encode_text(TOKENS))
        ]
    expected = clip_loss(Pairs(*sides, *sides), plain.model.logit_scale.exp()).item()
    assert running.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-4)


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match=r"loss is 'hinge'; expected one of softmax, sigmoid"):
        wrapper(loss="hinge")
