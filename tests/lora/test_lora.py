"""LoRA by peft: against steps written out with the merged matrices, in chunks, on two processes, resumed, loaded."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

import train_clip
from tests.adapters.tiny_families import save
from tests.conftest import TINY, said, write_pairs
from tests.distributed.two_processes import bare_trainer, run
from tests.faults.command import require_same_state
from train_clip import cli
from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.own import read_checkpoint, write_safetensors
from train_clip.errors import UserError
from train_clip.gather import world
from train_clip.lora.file import A, B, merged
from train_clip.lora.wrapper import LoRAWrapper
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.options import LoRAOptions

peft = pytest.importorskip("peft")

LORA = LoRAOptions(3, 6.0)
NUM_PAIRS, RATE = 8, 0.05
SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": RATE, "warmup_steps": 0}
RESNET = {"size": 32, "blocks": [1, 1, 1, 1], "width": 8}
RUN = "--folder pairs --batch_size 4 --val_share 0 --accelerator cpu --num_workers 0 --enable_progress_bar false"


def backbone(folder: Path, **changed: Any) -> Path:
    """A small CLIP of random weights, in a file."""
    torch.manual_seed(0)
    config = config_from_dict(TINY | changed)
    write_safetensors(config, CLIP(config).state_dict(), folder / "backbone.safetensors")
    return folder / "backbone.safetensors"


def module_of(place: Path, lora: LoRAOptions = LORA, **how: Any) -> LoRAWrapper:
    """LoRA beside a file's model, away from its start, at which half of its gradients are 0."""
    torch.manual_seed(1)
    module = LoRAWrapper(place, lora, **how)
    for name, parameter in module.model.named_parameters():
        if name.endswith(B):
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def batch() -> tuple[Tensor, Tensor]:
    made_up = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (NUM_PAIRS, 3, 16, 16), dtype=torch.uint8, generator=made_up)
    tokens = torch.randint(1, 999, (NUM_PAIRS, 9), generator=made_up)
    tokens[:, -1] = TINY["text"]["vocab"] - 1
    return images, tokens


def trained(module: LoRAWrapper) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in module.model.named_parameters() if one.requires_grad}


def step(place: Path, **how: Any) -> dict[str, Tensor]:
    """One step in float64 on the batch, of which each process has its share; what is trained, after it."""
    rank, processes = world()
    share = slice(rank * NUM_PAIRS // processes, (rank + 1) * NUM_PAIRS // processes)
    images, tokens = batch()
    module = module_of(place, **SGD | how)
    loader = DataLoader([(images[share], tokens[share])], batch_size=None)
    bare_trainer(max_steps=1, precision="64-true").fit(module, loader)
    return trained(module)


def test_its_start_is_the_backbone(tmp_path):
    """Features, to float32's rounding; trained are two matrices for each of a block's four, and the temperature."""
    place = backbone(tmp_path)
    plain, module = train_clip.load(place).model, LoRAWrapper(place, LORA).eval()
    images, tokens = batch()
    for tower, given in (("image", images), ("text", tokens)):
        mine, before = (getattr(one, f"encode_{tower}")(given) for one in (module.model, plain))
        torch.testing.assert_close(mine, before, rtol=0, atol=2e-6)
    names = trained(module)
    assert len(names) == 1 + 2 * 2 * 2 * 4
    # In and out of the fused projection, the one after it, and the two of the MLP.
    of_block = 3 * (16 + 48) + 3 * (16 + 16) + 2 * 3 * (16 + 64)
    assert sum(one.numel() for one in names.values()) == 1 + 4 * of_block


def test_a_step_is_that_of_a_loop_written_out(tmp_path):
    """Plain autograd through W + s · B A, by the model that has no LoRA: 1e-12 in float64."""
    place = backbone(tmp_path)
    found, start = step(place), {name: one.double() for name, one in trained(module_of(place)).items()}
    plain, (images, tokens) = train_clip.load(place, dtype=torch.float64).model, batch()
    leaves = {name: one.clone().requires_grad_() for name, one in start.items()}
    whole = merge_by_hand(plain.state_dict(), leaves)
    logits = functional_call(plain, whole, (images, tokens))[0]
    labels = torch.arange(NUM_PAIRS)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        torch.testing.assert_close(found[name], leaf.detach() - RATE * gradient, rtol=0, atol=1e-12, msg=name)


def merge_by_hand(kept: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices with LoRA, each named for itself."""
    whole = kept | {"logit_scale": trained["logit_scale"]}
    for tower in ("visual.transformer", "transformer"):
        for block in range(2):
            at = f"{tower}.resblocks.{block}."
            layers = {
                "attn.in_proj_weight": "attn",
                "attn.out_proj.weight": "attn.base_layer.out_proj",
                "mlp.c_fc.weight": "mlp.c_fc",
                "mlp.c_proj.weight": "mlp.c_proj",
            }
            for matrix, layer in layers.items():
                product = trained[at + layer + B] @ trained[at + layer + A]
                whole = whole | {at + matrix: kept[at + matrix] + 2.0 * product}
    return whole


@pytest.mark.parametrize("how", [{"minibatch_size": 3}, {"minibatch_size": 4, "gradient_checkpointing": 1}], ids=str)
def test_chunks_and_recomputation_change_nothing(tmp_path, how):
    place = backbone(tmp_path)
    whole, found = step(place), step(place, **how)
    for name, one in whole.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-12, msg=name)


def test_two_processes_step_as_one(tmp_path):
    place = backbone(tmp_path)
    (tmp_path / "talk").mkdir()
    alone, both = step(place), run(partial(step, place), tmp_path / "talk")
    for name, one in alone.items():
        for found in both:
            torch.testing.assert_close(found[name], one, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "lora",
    [LORA, LoRAOptions(2, lora_towers="text"), LoRAOptions(2, 4.0, "image", [1])],
    ids=["both", "text", "second block of images"],
)
def test_what_is_loaded_is_the_backbone_merged(tmp_path, lora):
    """Keys and shapes of the backbone, features of the module to 1e-6; a tower that has no LoRA stays to the bit."""
    place = backbone(tmp_path)
    module = module_of(place, lora, ema=0.5).eval()
    trainer = bare_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    assert (tmp_path / "lora.ckpt").stat().st_size < place.stat().st_size / 20
    plain, loaded = train_clip.load(place).model, train_clip.load(tmp_path / "lora.ckpt").model
    forms = [{name: one.shape for name, one in model.state_dict().items()} for model in (plain, loaded)]
    assert forms[0] == forms[1]
    images, tokens = batch()
    for tower, given in (("image", images), ("text", tokens)):
        mine, its, before = (getattr(one, f"encode_{tower}")(given) for one in (module.model, loaded, plain))
        torch.testing.assert_close(F.normalize(its), F.normalize(mine), rtol=0, atol=1e-6)
        assert torch.equal(its, before) == (lora.lora_towers not in ("both", tower))
    again = LoRAWrapper.load_from_checkpoint(tmp_path / "lora.ckpt")
    mine, its = module.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one, its[name]) for name, one in mine.items())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("pairs"), 12)
    backbone(tmp_path)
    return tmp_path


def train(words: str) -> None:
    cli.main(["train", *words.split()])


def test_a_run_resumes_to_the_bit_and_is_used_as_any(here, capsys):
    """Weights, EMA and optimizer; then inspected, converted, its merged weights trained on; the backbone moved."""
    options = f"--pretrained backbone.safetensors --lora 2 {RUN} --ema 0.9 --minibatch_size 2 --mask_ratio 0.5"
    train(f"{options} --max_steps 5 --output whole")
    train(f"{options} --max_steps 5 --output part --keep 9 --save_every 2")
    for file in ("last", "step-00000003", "step-00000004", "step-00000005"):
        Path(f"part/checkpoints/{file}.ckpt").unlink(missing_ok=True)
    Path("backbone.safetensors").rename("moved.safetensors")
    with pytest.raises(SystemExit) as stop:
        train("--resume part")
    assert "LoRA, whose backbone cannot be loaded (" in said(stop) and "If it has moved: --backbone" in said(stop)
    train("--resume part --pretrained moved.safetensors")
    Path("moved.safetensors").rename("backbone.safetensors")
    whole, part = (read_checkpoint(Path(f"{run}/checkpoints/last.ckpt")) for run in ("whole", "part"))
    require_same_state(whole, part)
    capsys.readouterr()
    cli.main(["inspect", "whole"])
    assert "rank 2, alpha 2, in all blocks of both towers" in capsys.readouterr().out
    cli.main("convert whole merged.safetensors".split())
    cli.main("convert whole folder --to open_clip".split())
    prints = {fingerprint(train_clip.load(name).model) for name in ("whole", "merged.safetensors", "folder")}
    assert len(prints) == 1 and prints != {fingerprint(train_clip.load("backbone.safetensors").model)}
    assert train_clip.load("whole/ema/last.ckpt").model.logit_scale.isfinite()
    train(f"--pretrained whole {RUN} --max_steps 1 --output further")
    assert "lora" not in read_checkpoint(Path("further/checkpoints/last.ckpt"))["hyper_parameters"]


def test_another_familys_model(here, capsys):
    """A SigLIP 2: its own loss, merged into its own format."""
    save("siglip", here / "siglip2")
    train(f"--pretrained siglip2 --lora 2 {RUN} --max_steps 2 --learning_rate 0.1 --output run")
    arguments = read_checkpoint(Path("run/checkpoints/last.ckpt"))["hyper_parameters"]
    assert arguments["loss"] == "sigmoid" and "adapter" not in arguments
    cli.main("convert run whole --to huggingface".split())
    loaded, written = train_clip.load("run"), train_clip.load("whole")
    assert fingerprint(loaded.model) == fingerprint(written.model)
    assert fingerprint(loaded.model) != fingerprint(train_clip.load("siglip2").model)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lora 2", "--lora 2: trains beside pretrained weights. Give some: --pretrained."),
        ("--lora_towers text --pretrained backbone.safetensors", "Give its rank too: --lora 8."),
        ("--lora 0 --pretrained backbone.safetensors", "lora is 0; expected 1 or above"),
        ("--lora 2 --lora_layers [7] --pretrained backbone.safetensors", "the image tower has 2 blocks; expected"),
        (
            "--lora 2 --half_weights text --pretrained backbone.safetensors",
            "half_weights is 'text', which does not go",
        ),
        ("--lora 2 --lock_image true --pretrained backbone.safetensors", "lock_image is True, which does not go with"),
        (
            "--lora 2 --distillation softmax --pretrained backbone.safetensors",
            "distillation is 'softmax', which does",
        ),
        ("--lora 2 --loss sigmoid --pretrained backbone.safetensors", "was trained with the softmax loss"),
        ("--lora 2 --pretrained resnet.safetensors", "the blocks of the image tower, ModifiedResNet, have none"),
    ],
)
def test_what_does_not_go_together_is_refused(here, words, expected):
    Path("resnet").mkdir()
    backbone(Path("resnet"), image=RESNET).rename("resnet.safetensors")
    with pytest.raises(SystemExit) as stop:
        train(f"{words} {RUN} --max_steps 1 --output run")
    assert expected in said(stop)
    assert not Path("run").exists()


def saved(place: Path, target: Path, **changed: Any) -> LoRAWrapper:
    """A checkpoint of LoRA, some of its arguments changed."""
    module, trainer = LoRAWrapper(place, LORA), bare_trainer()
    trainer.strategy.connect(module)
    module.hparams.update(changed)
    trainer.save_checkpoint(target)
    return module


def test_another_backbone_is_refused(tmp_path):
    """Known by its content, by what loads it and by what trains on."""
    place, other = backbone(tmp_path), tmp_path / "other.safetensors"
    config = saved(place, tmp_path / "lora.ckpt").model.config
    write_safetensors(config, CLIP(config).state_dict(), other)
    for load in (train_clip.load, LoRAWrapper.load_from_checkpoint):
        with pytest.raises(UserError, match=r"other\.safetensors: its weights are not those of the backbone"):
            load(tmp_path / "lora.ckpt", backbone=other)


@pytest.mark.parametrize(
    "changed",
    [{"lora": None}, {"lora": {"lora": None}}, {"lora": {"rank": 3}}, {"choices": 3}, {"digest": None}],
    ids=str,
)
def test_arguments_that_no_run_has(tmp_path, changed):
    """Without its backbone's digest any other would do."""
    saved(backbone(tmp_path), tmp_path / "lora.ckpt", **changed)
    with pytest.raises(UserError, match=r"lora\.ckpt: its LoRA is not as this package writes it \("):
        train_clip.load(tmp_path / "lora.ckpt")


@pytest.mark.parametrize(
    ("trained", "named"),
    [
        ({}, "any layer"),
        ({f"nothing{A}": (3, 8), f"nothing{B}": (6, 3)}, "nothing"),
        ({f"layer{A}": (3, 8)}, "layer"),
        ({f"layer{A}": (2, 8), f"layer{B}": (6, 2)}, "layer"),
        ({f"layer{A}": (3, 6), f"layer{B}": (8, 3)}, "layer"),
        ({f"norm{A}": (3, 8), f"norm{B}": (8, 3)}, "norm"),
        ({f"layer{A}": (3, 8), f"layer{B}": (6, 3), "more": (1,)}, "more"),
    ],
    ids=["none", "no such layer", "half of it", "another rank", "turned round", "of a vector", "something else"],
)
def test_tensors_that_do_not_fit_are_named(trained, named):
    kept = {"layer.weight": torch.ones(6, 8), "norm.weight": torch.ones(8)}
    with pytest.raises(UserError, match=rf"^lora\.ckpt: does not fit its backbone in {named}\. Expected"):
        merged(kept, {name: torch.ones(form) for name, form in trained.items()}, LORA, "lora.ckpt")


def test_batch_norms_stay_as_they_are(tmp_path):
    """Their statistics are in no checkpoint of LoRA."""
    module = LoRAWrapper(backbone(tmp_path), LORA)
    module.model.visual.norm = torch.nn.BatchNorm1d(2)
    assert module.train().model.visual.training
    assert not module.model.visual.norm.training


def test_a_run_goes_on_from_another_folder(here, monkeypatch):
    """Its backbone was named as seen from the first one."""
    train(
        f"--pretrained backbone.safetensors --lora 2 {RUN} --max_steps 1 --output run".replace("pairs", f"{here}/pairs")
    )
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    train("--resume ../run --max_steps 2")
    assert read_checkpoint(here / "run/checkpoints/last.ckpt")["global_step"] == 2


def test_without_the_library(tmp_path, monkeypatch):
    place = backbone(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs peft, .* pip install peft"):
        LoRAWrapper(place, LORA)


def test_its_options_are_the_documented_ones():
    document = Path(__file__).parents[2].joinpath("docs/finetuning.md").read_text(encoding="utf-8")
    table = document.split("## LoRA")[1].split("\n## ")[0]
    assert {field.name for field in dataclasses.fields(LoRAOptions)} == set(re.findall(r"^\| `--(\w+)`", table, re.M))
