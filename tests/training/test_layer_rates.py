"""The layer of every parameter by its name, and the rates that reach the optimizer and the log."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_encoders import bare_trainer, bert, image_tower, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from train_clip import CLIPWrapper, CustomCLIPWrapper
from train_clip.encoders.libraries import TextTower
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.options import TowerOptions
from train_clip.training.optimizer import blocks_of, peak_rates

IMAGES = {
    "vit": {"size": 16, "patch": 8, "layers": 3, "width": 16, "heads": 2},
    "resnet": {"size": 64, "blocks": [2, 1, 1, 1], "width": 2},
}
TEXT = {"context": 8, "vocab": 30, "layers": 2, "width": 12, "heads": 2}
D = 0.5

BEFORE, AFTER = -1, 99
VIT = {"class_embedding|positional_embedding|conv1|ln_pre": BEFORE, "ln_post|proj$": AFTER}
RESNET = {"(conv|bn)[123]": BEFORE, "attnpool": AFTER}
OWN_IMAGE = {"vit": (r"transformer\.resblocks\.", VIT, 3), "resnet": (r"layer", RESNET, 4)}
OWN_TEXT = {"token_embedding|positional_embedding": BEFORE, "ln_final|text_projection": AFTER}


def clip(image: str) -> CLIP:
    torch.manual_seed(0)
    return CLIP(config_from_dict({"embed_dim": 8, "image": IMAGES[image], "text": TEXT}))


def layer(name: str, block: str, others: dict[str, int], number: int) -> int:
    """By the names alone: the number of the block, or what a table says of those that begin like one of its keys."""
    if found := re.match(block + r"(\d+)\.", name):
        return int(found[1]) + 1
    place = next(place for start, place in others.items() if re.match(start, name))
    return 0 if place == BEFORE else number + 1


def assert_rates(rates: dict[nn.Parameter, float], tower: list[tuple[str, nn.Parameter]], *how: Any) -> None:
    number = how[2]
    assert {layer(name, *how) for name, _ in tower} == set(range(number + 2))
    for name, parameter in tower:
        assert rates[parameter] == pytest.approx(0.1 * D ** (number + 1 - layer(name, *how))), name


@pytest.mark.parametrize("image", IMAGES)
def test_clips_own_towers(image):
    """ViT and text tower block by block, the ResNet stage by stage: 0.1 · D^(L + 1 - l). The temperature has no own."""
    model = clip(image)
    rates = peak_rates(model, TowerOptions(layer_decay=D), 0.1)
    visual = list(model.visual.named_parameters())
    text = [(n, p) for n, p in model.named_parameters() if not n.startswith(("visual", "logit_scale"))]
    if image == "resnet":
        # Stages are counted from 1 in their names.
        visual = [(re.sub(r"^layer(\d)", lambda stage: f"layer{int(stage[1]) - 1}", n), p) for n, p in visual]
    assert_rates(rates, visual, *OWN_IMAGE[image])
    assert_rates(rates, text, r"transformer\.resblocks\.", OWN_TEXT, 2)
    assert model.logit_scale not in rates


def test_on_top_of_a_towers_own_rate():
    """Each tower's rate at its end, falling from there; what has no own falls from the rest's."""
    model = clip("vit")
    _, text = model.towers()
    rates = peak_rates(model, TowerOptions(image_learning_rate=3.0, layer_decay=D), 0.1)
    assert rates[model.visual.proj] == 3.0 and rates[model.visual.conv1.weight] == 3.0 * D**4
    assert rates[model.text_projection] == 0.1 and rates[model.token_embedding.weight] == 0.1 * D**3
    assert peak_rates(model, TowerOptions(text_learning_rate=2.0), 0.1) == dict.fromkeys(text, 2.0)


def test_a_text_tower_by_itself():
    """CLIP's, joined with another encoder."""
    tower = TextTower(clip("vit"))
    assert len(blocks_of(tower)) == 2


def encoders() -> dict[str, tuple[nn.Module, str, dict[str, int], int]]:
    """Encoders of transformers: the names of their blocks, of what lies before and after them, and how many."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vit = hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **small))
    dino = hf.Dinov2Model(hf.Dinov2Config(image_size=8, patch_size=4, mlp_ratio=2, **small))
    resnet = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 3, 1]))
    t5 = hf.T5EncoderModel(hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))
    return {
        "bert": (bert(), r"encoder\.layer\.", {"embeddings": BEFORE, "pooler": AFTER}, 2),
        "vit": (vit, r"(?:encoder\.layer|layers)\.", {"embeddings": BEFORE, "layernorm|pooler": AFTER}, 3),
        "dino": (dino, r"(?:encoder\.layer|layers)\.", {"embeddings": BEFORE, "layernorm": AFTER}, 3),
        "resnet": (resnet, r"encoder\.stages\.", {"embedder": BEFORE}, 3),
        "t5": (t5, r"encoder\.block\.", {"shared|encoder.embed": BEFORE, "encoder.final": AFTER}, 3),
    }


@pytest.mark.parametrize("name", ["bert", "vit", "dino", "resnet", "t5"])
def test_encoders_of_a_library(name):
    """By their names: embeddings 0, blocks or stages 1 to L, pooler and last norm L + 1; the projection has no own."""
    tower, block, others, number = encoders()[name]
    text = name in ("bert", "t5")
    other = image_tower(), bert()
    module = CustomCLIPWrapper(
        *((other[0], tower) if text else (tower, other[1])), project=True, avg_word_embs=True, image_size=8,
        distillation="none", lock_image=text, lock_text=not text,
    )  # fmt: skip
    rates = peak_rates(module.model, TowerOptions(layer_decay=D), 0.1)
    for key, parameter in tower.named_parameters():
        expected = layer(key, block, others, number)
        assert rates[parameter] == pytest.approx(0.1 * D ** (number + 1 - expected)), key
    assert len(rates) == len(list(tower.parameters()))


class Bottlenecks(nn.Module):
    """Stages as attributes, a deep stem before them and a head after them, as torchvision's and timm's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        for stage, blocks in enumerate((2, 3, 1, 2), 1):
            parts = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*parts))
        self.fc = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_stages_that_are_attributes():
    """The four stages, neither the convolutions of the stem nor the blocks of the largest stage."""
    tower = Bottlenecks()
    assert blocks_of(tower) == [tower.layer1, tower.layer2, tower.layer3, tower.layer4]


def test_a_tower_without_blocks():
    with pytest.raises(UserError, match=r"layer_decay is 0\.5; the image tower is ImageTower, in which no blocks"):
        CustomCLIPWrapper(image_tower(), bert(), image_size=8, layer_decay=D)
    CustomCLIPWrapper(image_tower(), bert(), image_size=8, layer_decay=D, lock_image=True)
    for wrong in (0.0, 1.1):
        with pytest.raises(UserError, match=r"layer_decay is .*expected above 0, up to 1"):
            CLIPWrapper("small", {"embed_dim": 8, "image": IMAGES["vit"], "text": TEXT}, layer_decay=wrong)


def test_the_optimizer_and_the_log_have_them():
    """Every trained parameter in one group at its rate, all following one schedule; the logged rate is the peak's."""
    torch.manual_seed(0)
    config = {"embed_dim": 8, "image": IMAGES["vit"], "text": TEXT}
    module = CLIPWrapper("small", config, learning_rate=0.1, warmup_steps=0, layer_decay=D, text_learning_rate=0.3)
    tokens = torch.randint(1, 29, (8, 8))
    tokens[:, -1] = 29
    data = DataLoader(TensorDataset(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), tokens), batch_size=2)
    trainer = bare_trainer(max_steps=2, max_epochs=-1)
    trainer.fit(module, data)
    groups = trainer.optimizers[0].param_groups
    found = {parameter: group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    for parameter, peak in (
        (module.model.logit_scale, 0.1),
        (module.model.visual.proj, 0.1),
        (module.model.visual.class_embedding, 0.1 * D**4),
        (module.model.visual.transformer.resblocks[1].mlp.c_fc.weight, 0.1 * D**2),
        (module.model.text_projection, 0.3),
        (module.model.transformer.resblocks[0].ln_1.bias, 0.3 * D**2),
    ):
        assert found[parameter]["initial_lr"] == pytest.approx(peak)
    assert len({round(group["lr"] / group["initial_lr"], 12) for group in groups}) == 1
    # Of the second and last step: half of the cosine.
    assert trainer.callback_metrics["train/learning_rate"].item() == pytest.approx(0.05)


def test_two_encoders_train():
    """A step of it, projection and temperature at the full rate."""
    vit = encoders()["vit"][0]
    module = CustomCLIPWrapper(vit, bert(), image_size=8, project=True, layer_decay=D, distillation="none")
    trainer = bare_trainer(max_steps=1, max_epochs=-1)
    trainer.fit(module, loader(4, 2))
    peaks = {p: group["initial_lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert peaks[module.model.logit_scale] == 3e-3
    assert min(peaks.values()) == pytest.approx(3e-3 * D**4)
