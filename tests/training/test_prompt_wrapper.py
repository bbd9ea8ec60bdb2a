"""Prompt tuning under a bare Trainer: what moves, what is kept, what belongs together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import train_clip
from tests.conftest import TINY
from train_clip import CLIPWrapper, PromptCLIPWrapper, cli
from train_clip.checkpoints.found import digest_of, find_weights
from train_clip.checkpoints.own import LIGHTNING, read_checkpoint
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.options import WeightOptions
from train_clip.prompts.file import PromptConfig

DEEP = PromptConfig(3, (0, 1), 0.0, class_token=True)
TRAINED = {"model.visual.prompts.0", "model.visual.prompts.1", "model.visual.backbone.class_embedding"}


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    write_model(CLIP(config_from_dict(TINY)), tmp_path / "backbone.safetensors", "safetensors")
    return tmp_path / "backbone.safetensors"


def loader(number: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (number, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return DataLoader([(image, f"picture {place % 5}") for place, image in enumerate(images)], batch_size=4)


def fit(module: L.LightningModule, folder: Path, epochs: int = 2, **how: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, enable_checkpointing=False, **quiet)
    trainer.fit(module, loader(), weights_only=True, **how)
    return trainer


def prompts(backbone: Path, config: PromptConfig = DEEP, **how: Any) -> PromptCLIPWrapper:
    torch.manual_seed(7)
    return PromptCLIPWrapper(backbone, config, learning_rate=0.5, warmup_steps=0, **how)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_prompts_move_and_nothing_else_does(backbone, tmp_path, optimizer):
    """Six steps: every trained tensor has changed, every other is the same bit for bit, and in no optimizer group."""
    module = prompts(backbone, optimizer=optimizer)
    before = copy.deepcopy(module.state_dict())
    trainer = fit(module, tmp_path)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == TRAINED
    grouped = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert grouped == len(TRAINED)


def test_micro_batches_and_the_whole_batch_give_the_same_prompts(backbone, tmp_path):
    """Chunks of two of four pairs, through two epochs of SGD: 1e-6 in float32."""
    whole, chunks = prompts(backbone), prompts(backbone, minibatch_size=2)
    fit(whole, tmp_path), fit(chunks, tmp_path)
    for name in TRAINED:
        torch.testing.assert_close(whole.state_dict()[name], chunks.state_dict()[name], rtol=0, atol=1e-6)


def test_each_caption_is_encoded_once(backbone, tmp_path):
    """Five different captions in six batches: the text tower sees five rows in all."""
    module, rows = prompts(backbone), []
    module.model.transformer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    fit(module, tmp_path)
    assert sum(rows) == 5
    plain = CLIPWrapper("tiny", TINY | {"name": "tiny"}, lock_text=True)
    rows.clear()
    plain.model.transformer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    fit(plain, tmp_path)
    assert sum(rows) == 5


def test_captions_out_of_memory_are_what_the_tower_makes(backbone):
    """The table's rows against the tower itself, for batches in any order with repeats, a short one known: 1e-6."""
    module = prompts(backbone)
    for captions in (["a", "b b b", "a"], ["c", "b b b"], ["a"], ["a", "d d d d d"]):
        tokens = module.tokenizer.batch(captions)[0]
        _, found = module._towers.embed(
            module.model, module._reader.read((torch.zeros(len(captions), 3, 16, 16), tokens), module.device), 0
        )
        expected = nn.functional.normalize(module.model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert len(module._towers.fixed_texts) == 4


def test_the_table_of_captions_is_bounded(backbone, monkeypatch):
    """Room for two rows of 16 float32: the first two are kept, and each batch is what the tower makes: 1e-6."""
    monkeypatch.setattr("train_clip.training.encode.MOST_FIXED", 2 * (16 * 4 + 800) + 100)
    module, rows = prompts(backbone), []
    module.model.transformer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    for captions in (["a"], ["b b", "c", "b b"], ["c", "a", "d d d"], ["b b", "a"]):
        tokens = module.tokenizer.batch(captions)[0]
        inputs = module._reader.read((torch.zeros(len(captions), 3, 16, 16), tokens), module.device)
        _, found = module._towers.embed(module.model, inputs, 0)
        encoded = sum(rows)
        expected = nn.functional.normalize(module.model.encode_text(tokens), dim=-1)
        rows[:] = [encoded]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert len(module._towers.fixed_texts) == 2
    assert sum(rows) == 1 + 2 + 2 + 0


def test_what_a_checkpoint_holds(backbone, tmp_path):
    """The trained tensors and plain data; it loads with ``load`` and as a module, and both embed alike."""
    module = prompts(backbone)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    state = read_checkpoint(tmp_path / "p.ckpt")
    assert set(state["state_dict"]) == TRAINED
    again = PromptCLIPWrapper.load_from_checkpoint(tmp_path / "p.ckpt")
    loaded = train_clip.load(tmp_path / "p.ckpt").model
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = module.eval().model.encode_image(images)
    assert torch.equal(again.eval().model.encode_image(images), expected)
    assert torch.equal(loaded.encode_image(images), expected)


def test_a_run_goes_on_where_it_stopped(backbone, tmp_path):
    """Stopped after one epoch of two and resumed, against the run that never stopped: 1e-6, dropout included.

    A caption is encoded among others than before, so that it is not bit for bit.
    """
    config = PromptConfig(3, (0, 1), 0.3, class_token=True)
    whole = prompts(backbone, config)
    fit(whole, tmp_path)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    first, second = prompts(backbone, config), prompts(backbone, config)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=2, callbacks=[Stop()], enable_checkpointing=False, **quiet).fit(first, loader())
    fit(second, tmp_path, ckpt_path=tmp_path / "half.ckpt")
    for name in TRAINED:
        torch.testing.assert_close(second.state_dict()[name], whole.state_dict()[name], rtol=0, atol=1e-6)


def test_a_backbone_is_known_by_its_content(backbone, tmp_path):
    """The same weights in another format serve; other weights are refused, by ``load`` and as a module."""
    trainer = fit(prompts(backbone), tmp_path)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    model = train_clip.load(backbone).model
    write_model(model, tmp_path / "hf", "huggingface")
    with torch.no_grad():
        model.logit_scale += 1e-3
    write_model(model, tmp_path / "other.safetensors", "safetensors")
    backbone.rename(tmp_path / "moved.safetensors")
    with pytest.raises(
        UserError, match=r"p\.ckpt: visual prompts, whose backbone cannot be loaded .*backbone\.safe.*--backbone"
    ):
        train_clip.load(tmp_path / "p.ckpt")
    for place in ("hf", "moved.safetensors"):
        train_clip.load(tmp_path / "p.ckpt", backbone=tmp_path / place)
        PromptCLIPWrapper.load_from_checkpoint(tmp_path / "p.ckpt", backbone=tmp_path / place)
    with pytest.raises(UserError, match="are not those of the backbone"):
        train_clip.load(tmp_path / "p.ckpt", backbone=tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not those of the backbone that this was trained with"):
        PromptCLIPWrapper.load_from_checkpoint(tmp_path / "p.ckpt", backbone=tmp_path / "other.safetensors")


def test_a_backbone_of_another_activation_is_refused(backbone, tmp_path):
    """Equal tensors and gelu in place of quick_gelu are another model; a bare state dict takes the checkpoint's."""
    trainer = fit(prompts(backbone), tmp_path)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    state = train_clip.load(backbone).model.state_dict()
    other = CLIP(config_from_dict(TINY | {"activation": "gelu"}))
    other.load_state_dict(state)
    write_model(other, tmp_path / "gelu.safetensors", "safetensors")
    with pytest.raises(UserError, match="its activation is gelu, expected quick_gelu"):
        train_clip.load(tmp_path / "p.ckpt", backbone=tmp_path / "gelu.safetensors")
    torch.save(state, tmp_path / "bare.pt")
    loaded = train_clip.load(tmp_path / "p.ckpt", backbone=tmp_path / "bare.pt").model
    assert loaded.config == train_clip.load(tmp_path / "p.ckpt").model.config


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_backbone_of_other_pixels_is_refused(backbone, tmp_path, name):
    """Equal tensors behind another normalisation of the pixels are another model."""
    fit(prompts(backbone), tmp_path).save_checkpoint(tmp_path / "p.ckpt")
    other = CLIP(config_from_dict(TINY | {name: [0.5, 0.5, 0.5]}))
    other.load_state_dict(train_clip.load(backbone).model.state_dict())
    write_model(other, tmp_path / "other.safetensors", "safetensors")
    with pytest.raises(UserError, match=rf"another model: its {name} is \(0\.5, 0\.5, 0\.5\), expected"):
        train_clip.load(tmp_path / "p.ckpt", backbone=tmp_path / "other.safetensors")


def test_the_digest_is_of_the_file_and_not_of_what_was_interpolated(backbone, tmp_path):
    """Interpolation rounds by the processor: the digest is the backbone's own, at any size that was asked for."""
    weights = find_weights(backbone, WeightOptions(image_size=32, context_length=24))
    larger = PromptCLIPWrapper(weights, DEEP, learning_rate=0.5)
    assert larger.hparams["digest"] == prompts(backbone).hparams["digest"]
    again = PromptCLIPWrapper(**{name: larger.hparams[name] for name in PromptCLIPWrapper.names_of_model})
    assert torch.equal(
        again.model.visual.backbone.positional_embedding, larger.model.visual.backbone.positional_embedding
    )
    assert again.model.config.text.context == 24


def test_there_is_no_teacher(backbone):
    """Distillation is refused: its teacher's prompts would be in no checkpoint."""
    with pytest.raises(UserError, match="distillation is transport; the backbone of prompts is frozen and not changed"):
        prompts(backbone, distillation="transport")


@pytest.mark.parametrize("how", [{"mask_ratio": 0.5}, {"stochastic_depth": 0.1}, {"layer_decay": 0.75}])
def test_the_backbone_runs_as_it_is(backbone, how):
    """What changes how a tower is trained is refused: it is not."""
    with pytest.raises(UserError, match=f"{next(iter(how))} is .*the backbone of prompts is frozen and not changed"):
        prompts(backbone, **how)


def test_new_weights_empty_the_table_of_captions(backbone):
    """Embeddings of the tower that was there before are not those of the next."""
    module = prompts(backbone)
    tokens = module.tokenizer.batch(["a"])[0]
    module._towers.embed(module.model, module._reader.read((torch.zeros(1, 3, 16, 16), tokens), module.device), 0)
    assert len(module._towers.fixed_texts) == 1
    module.begin_with(module.model.state_dict(), "itself")
    assert len(module._towers.fixed_texts) == 0


def test_a_resumed_run_empties_the_table_of_captions(backbone, tmp_path):
    """What was kept before belongs to the weights that the checkpoint replaces."""
    trainer = fit(prompts(backbone), tmp_path)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    module = prompts(backbone)
    module._towers.fixed_texts[0] = torch.zeros(16)
    module.on_load_checkpoint(read_checkpoint(tmp_path / "p.ckpt"))
    assert not module._towers.fixed_texts


def test_the_digest_minds_names_shapes_and_values():
    """Equal for equal content in any order, another for any single change."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1), "c": torch.empty(0)}
    expected = digest_of(tensors)
    assert digest_of(dict(reversed(tensors.items()))) == expected
    assert digest_of(tensors | {"a": torch.arange(6).view(2, 3).half()}) == expected
    for other in ({"a": torch.arange(6.0).view(3, 2)}, {"b": torch.tensor(2)}, {"d": torch.tensor(1)}):
        assert digest_of(tensors | other) != expected


def test_prompts_on_prompts_are_refused(backbone, tmp_path):
    """A checkpoint of prompts is no backbone, and no format of others holds it."""
    trainer = fit(prompts(backbone), tmp_path)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    with pytest.raises(UserError, match="expected a CLIP without prompts"):
        PromptCLIPWrapper(tmp_path / "p.ckpt", DEEP)
    for words in (
        ["train"],
        ["finetune"],
        ["convert", str(tmp_path / "p.ckpt"), str(tmp_path / "out"), "--to", "open_clip"],
    ):
        start = [] if "convert" in words else ["--pretrained", str(tmp_path / "p.ckpt"), "--folder", str(tmp_path)]
        with pytest.raises(SystemExit, match="expected a CLIP without prompts"):
            cli.main([*words, *start])
    with pytest.raises(UserError, match="a CLIP with visual prompts, which no other format can hold"):
        write_model(train_clip.load(tmp_path / "p.ckpt").model, tmp_path / "out", "open_clip")


def test_the_forks_checkpoints_load_and_compute_what_it_computes(tmp_path):
    """The first block inserts, the middle ones replace, the last lets pass; against that written out, float32: 1e-5."""
    config = config_from_dict(
        TINY
        | {
            "image": {"size": 16, "patch": 8, "layers": 4, "width": 64, "heads": 1},
            "text": TINY["text"] | {"width": 64, "heads": 1},
        }
    )
    torch.manual_seed(5)
    clip = CLIP(config).eval()
    state = {f"model.{name}": tensor for name, tensor in clip.state_dict().items()}
    own = {number: torch.randn(5, 64) for number in range(4)}
    state |= {f"model.visual.transformer.resblocks.{n}.prompt_embeddings": value for n, value in own.items()}
    torch.save({LIGHTNING: "1.5.0", "epoch": 3, "state_dict": state}, tmp_path / "fork.ckpt")
    images = torch.randn(2, 3, 16, 16)
    x = clip.visual.embed(images)
    for number, block in enumerate(clip.visual.transformer.resblocks):
        if number == 0:
            x = torch.cat([x[:, :1], own[0].expand(2, -1, -1), x[:, 1:]], dim=1)
        elif number < 3:
            x = torch.cat([x[:, :1], own[number].expand(2, -1, -1), x[:, 6:]], dim=1)
        x = block(x)
    expected = clip.visual.ln_post(x[:, 0]) @ clip.visual.proj
    with pytest.warns(
        UserWarning, match="dropped visual.transformer.resblocks.3.prompt_embeddings, which were never used"
    ):
        loaded = train_clip.load(tmp_path / "fork.ckpt").model
    torch.testing.assert_close(loaded.encode_image(images), expected, rtol=0, atol=1e-5)
    assert list(loaded.visual.prompts) == ["0", "1", "2"]
    from train_clip.commands.inspect import inspect

    said = inspect(str(tmp_path / "fork.ckpt"))
    assert said["left out"] == "visual.transformer.resblocks.3.prompt_embeddings"
    assert said["prompts"] == "5 at each of the blocks 0, 1, 2; class token trained"
