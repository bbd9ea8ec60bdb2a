"""The running mean of the weights (``--ema``) against a loop in float64, and in every kind of run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.conftest import TINY
from tests.training.tiny_encoders import SIDE, bare_trainer, bert, image_tower, loader
from train_clip import CLIP, CLIPWrapper, CustomCLIPWrapper, PromptCLIPWrapper
from train_clip.checkpoints.own import read_checkpoint
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.models.config import config_from_dict
from train_clip.options import TrainingOptions
from train_clip.prompts.file import PromptConfig
from train_clip.training.checkpoints import Checkpoints, Interval
from train_clip.training.ema import WeightsEMA

B = 4
RESNET = {
    "name": "tiny", "embed_dim": 16, "image": {"size": 64, "blocks": [1, 1, 1, 1], "width": 2},
    "text": TINY["text"], "optimizer": TINY["optimizer"],
}  # fmt: skip
DEEP = PromptConfig(3, (0, 1), 0.0, class_token=True)
MOMENTUM = 0.35  # reached within four updates: (1 + 4) / (10 + 4) is above it


def pixels(batches: int, size: int = 64, poisoned: int | None = None) -> DataLoader[Any]:
    """Normalised images with captions; one value of one image of the poisoned batch (from 0) is NaN."""
    images = torch.randn(batches * B, 3, size, size, generator=torch.Generator().manual_seed(0))
    if poisoned is not None:
        images[poisoned * B + 1, 0, 3, 3] = torch.nan
    return DataLoader([(image, f"picture {index}") for index, image in enumerate(images)], batch_size=B)


class Loop(L.Callback):
    """The mean by its formula, in float64, from the weights after every batch that ends with an update."""

    def __init__(self, model: nn.Module, accumulate: int = 1, momentum: float = MOMENTUM) -> None:
        self.mean = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        self.accumulate, self.momentum, self.count = accumulate, momentum, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, place: int) -> None:
        if (place + 1) % self.accumulate == 0 or trainer.is_last_batch:
            m = min(self.momentum, (1 + self.count) / (10 + self.count))
            for name, parameter in module.model.named_parameters():
                self.mean[name] = m * self.mean[name] + (1 - m) * parameter.detach().double()
            self.count += 1

    def assert_is(self, mean: WeightsEMA) -> None:
        assert mean.num_updates == self.count
        for name, parameter in mean.model.named_parameters():
            assert parameter.dtype == torch.float32 and not parameter.requires_grad, name
            torch.testing.assert_close(parameter.double(), self.mean[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"half_weights": "both", "adam_statistics": "bfloat16", "precision": "bf16-mixed"},
        {"minibatch_size": 3, "gradient_checkpointing": 1},
        {"loss": "sigmoid"},
    ],
    ids=lambda how: " ".join(map(str, how)) or "plain",
)
def test_the_mean_of_a_run_is_the_loops(how: dict[str, Any]) -> None:
    """Seven batches of a ResNet that begins with too high a temperature: update, clamp, mean; buffers are the model's.

    Accumulation over 3 of 7 batches is three updates. Half weights are followed in float32.
    """
    own = {name: how[name] for name in how if name in ("accumulate_grad_batches", "precision", "gradient_clip_val")}
    torch.manual_seed(0)
    rest = {name: value for name, value in how.items() if name not in own}
    module = CLIPWrapper("tiny", RESNET, learning_rate=1e-2, warmup_steps=0, ema=MOMENTUM, **rest)
    nn.init.constant_(module.model.logit_scale, 7.0)
    loop = Loop(module.model, own.get("accumulate_grad_batches", 1))
    module.ema.model.load_state_dict(module.model.state_dict())
    bare_trainer(callbacks=[loop], **own).fit(module, pixels(7))
    assert loop.count == (3 if "accumulate_grad_batches" in how else 7)
    loop.assert_is(module.ema)
    moved = module.model.visual.conv1.weight - module.ema.model.visual.conv1.weight
    assert moved.abs().max() > 1e-4
    theirs = dict(module.model.named_buffers())
    assert any("running_var" in name for name in theirs)
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in module.ema.model.named_buffers())
    assert not any(part.training for part in module.ema.modules())


def test_training_is_what_it_is_without() -> None:
    """The same weights, bit for bit, and no further names in a run without."""
    ends = []
    for ema in (0.0, 0.9):
        torch.manual_seed(0)
        module = CLIPWrapper("tiny", TINY, learning_rate=1e-2, warmup_steps=0, ema=ema)
        bare_trainer().fit(module, pixels(3, 16), pixels(1, 16))
        ends.append(module.model.state_dict())
        names = {name.partition(".")[0] for name in module.state_dict()}
        assert names == ({"model", "ema"} if ema else {"model"})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


class Means(L.Callback):
    """The state of the mean before each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.seen.append(copy.deepcopy(module.ema.state_dict()))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def test_a_skipped_step_is_no_update() -> None:
    """Under 16-mixed's scaler, NaN in the third batch: mean and count stay, the teacher's too; all is finite."""
    torch.manual_seed(0)
    module, means = CLIPWrapper("tiny", RESNET, warmup_steps=0, ema=MOMENTUM, distillation="transport"), Means()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    bare_trainer(callbacks=[means], plugins=[plugin]).fit(module, pixels(5, poisoned=2))
    assert_same(means.seen[3], means.seen[2])
    assert module.ema.num_updates == module.distillation.teacher.num_updates == 4
    assert not torch.equal(means.seen[4]["model.logit_scale"], means.seen[3]["model.logit_scale"])
    assert all(tensor.isfinite().all() for tensor in module.ema.model.state_dict().values())


def test_on_a_device_that_runs_ahead_no_nan_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: steps after the poisoned one are held back until the flag is read; BatchNorm's NaN is left out."""
    monkeypatch.setattr("train_clip.training.end_of_step.known_at_once", lambda *_: False)
    torch.manual_seed(0)
    module = CLIPWrapper("tiny", RESNET, warmup_steps=0, ema=MOMENTUM)
    with pytest.raises(UserError, match="Batch 2: the loss is nan"):
        bare_trainer(log_every_n_steps=4).fit(module, pixels(5, poisoned=1))
    assert module.ema.num_updates == 4
    assert not all(tensor.isfinite().all() for tensor in module.model.buffers())
    assert all(tensor.isfinite().all() for tensor in module.ema.model.state_dict().values())


def test_what_is_locked_is_held_once() -> None:
    """A locked text tower is the model's own; the other tensors are copies. A run leaves it as it was."""
    torch.manual_seed(0)
    module = CLIPWrapper("tiny", TINY, warmup_steps=0, lock_text=True, ema=MOMENTUM)
    before = module.model.token_embedding.weight.clone()
    loop = Loop(module.model)
    bare_trainer(callbacks=[loop]).fit(module, pixels(3, 16), pixels(1, 16))
    loop.assert_is(module.ema)
    assert module.ema.model.token_embedding.weight is module.model.token_embedding.weight
    assert torch.equal(module.model.token_embedding.weight, before)
    shared = set(module.model.parameters()) & set(module.ema.model.parameters())
    assert {name for name, tensor in module.model.named_parameters() if tensor not in shared} == {
        name for name, tensor in module.model.named_parameters() if tensor.requires_grad
    }


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, float("nan")])
def test_other_momenta_are_refused(momentum: float) -> None:
    """With what was found and what to give."""
    with pytest.raises(UserError, match=r"ema is .*; expected from 0 to below 1"):
        TrainingOptions.of({"ema": momentum})


def test_half_precision_of_all_weights_is_refused() -> None:
    """There the mean would stand still."""
    with pytest.raises(
        UserError,
        match=r"bf16-true: in half precision an EMA of the weights, and so the teacher, would not change.* --ema 0",
    ):
        bare_trainer(precision="bf16-true").fit(CLIPWrapper("tiny", TINY, ema=0.9), pixels(1, 16))


def custom(**how: Any) -> CustomCLIPWrapper:
    return CustomCLIPWrapper(image_tower(), bert(0.1), avg_word_embs=True, image_size=SIDE, **how)


def test_beside_distillation_both_means_are_their_own(tmp_path: Path) -> None:
    """Teacher and mean against two loops; the mean's file has neither, and loads strictly as the mean."""
    module = custom(ema=MOMENTUM)
    loops = Loop(module.model), Loop(module.model, momentum=0.999)
    saving = Checkpoints(tmp_path, Interval(steps=1))
    bare_trainer(callbacks=[*loops, saving], enable_checkpointing=True, max_epochs=2).fit(module, loader(12, 4))
    loops[0].assert_is(module.ema)
    loops[1].assert_is(module.distillation.teacher)
    state = read_checkpoint(tmp_path / "ema" / "last.ckpt")
    assert state["hyper_parameters"] == read_checkpoint(tmp_path / "last.ckpt")["hyper_parameters"] | {
        "ema": 0.0,
        "distillation": "none",
    }
    again, whole = (
        CustomCLIPWrapper.load_from_checkpoint(tmp_path / name, image_encoder=image_tower(), text_encoder=bert(0.1))
        for name in ("ema/last.ckpt", "last.ckpt")
    )
    for name, value in module.ema.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
        assert torch.equal(whole.ema.model.state_dict()[name], value), name
        assert torch.equal(whole.model.state_dict()[name], module.model.state_dict()[name]), name
    assert whole.ema.num_updates == module.ema.num_updates == 6


def test_older_checkpoints_of_distillation_load() -> None:
    """The names and the further state that the teacher has had: a run of before ``--ema`` goes on."""
    state = custom().state_dict()
    of_teacher = {name for name in state if name.startswith("distillation.teacher.")}
    assert of_teacher == {
        "distillation.teacher._extra_state",
        *(f"distillation.teacher.{name}" for name in state if name.startswith("model.")),
    }
    assert state["distillation.teacher._extra_state"] == {"num_updates": 0}


def test_the_mean_is_no_state_to_go_on_from(tmp_path: Path) -> None:
    """Under a bare Trainer: a message that says so, and what to give."""
    module = CLIPWrapper("tiny", TINY, ema=0.9)
    saving = Checkpoints(tmp_path, Interval(steps=1))
    bare_trainer(callbacks=[saving], enable_checkpointing=True).fit(module, pixels(2, 16))
    with pytest.raises(UserError, match=r"holds the EMA .* Expected one of RUN/checkpoints/\..*--pretrained"):
        bare_trainer().fit(module, pixels(2, 16), ckpt_path=tmp_path / "ema" / "last.ckpt", weights_only=True)


def prompts(backbone: Path) -> PromptCLIPWrapper:
    torch.manual_seed(7)
    return PromptCLIPWrapper(backbone, DEEP, learning_rate=0.5, warmup_steps=0, ema=MOMENTUM)


def test_prompts_keep_what_is_trained_and_its_mean(tmp_path: Path) -> None:
    """Six steps, by the loop; files hold three tensors and their means; a run goes on from the third to the same."""
    torch.manual_seed(3)
    write_model(CLIP(config_from_dict(TINY)), tmp_path / "backbone.safetensors", "safetensors")
    module = prompts(tmp_path / "backbone.safetensors")
    loop, how = Loop(module.model), {"enable_checkpointing": True, "max_epochs": 2}
    bare_trainer(callbacks=[loop, Checkpoints(tmp_path, Interval(steps=1), 9)], **how).fit(module, pixels(3, 16))
    loop.assert_is(module.ema)
    trained = {"visual.prompts.0", "visual.prompts.1", "visual.backbone.class_embedding"}
    state, mean = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("last.ckpt", "ema/last.ckpt"))
    assert set(mean) == {f"model.{name}" for name in trained}
    assert set(state) == {*mean, *(f"ema.{name}" for name in mean), "ema._extra_state"}
    again, rest = PromptCLIPWrapper.load_from_checkpoint(tmp_path / "ema/last.ckpt"), prompts(module.hparams.backbone)
    bare_trainer(max_epochs=2).fit(rest, pixels(3, 16), ckpt_path=tmp_path / "step-00000003.ckpt", weights_only=True)
    for name in trained:
        expected = module.ema.model.state_dict()[name]
        assert torch.equal(again.model.state_dict()[name], expected), name
        torch.testing.assert_close(rest.ema.model.state_dict()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert rest.ema.num_updates == 6
