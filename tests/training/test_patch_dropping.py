"""Steps that look at some patches: how many, until when, and the same ones in the recomputation."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from tiny_encoders import bert, image_tower
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from train_clip import CLIPWrapper, CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.models.switches import recompute_blocks
from train_clip.training.encode import Chunks, encode_in_chunks

VIT = {"size": 16, "patch": 4, "layers": 2, "width": 16, "heads": 2}  # 16 patches
RESNET = {"size": 64, "blocks": [1, 1, 1, 1], "width": 2}
TEXT = {"context": 8, "vocab": 30, "layers": 1, "width": 12, "heads": 2}
B, STEPS = 4, 10


def wrapper(image: dict[str, Any] = VIT, **how: Any) -> CLIPWrapper:
    torch.manual_seed(0)
    return CLIPWrapper("small", {"embed_dim": 8, "image": image, "text": TEXT}, warmup_steps=0, **how)


def rows(number: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 29, (number, 8), generator=generator)
    tokens[:, -1] = 29
    return torch.randint(256, (number, 3, size, size), generator=generator, dtype=torch.uint8), tokens


class Seen(L.Callback):
    """Notes how many tokens the first block takes, in training and in validation."""

    def __init__(self) -> None:
        self.training: list[int] = []
        self.validation: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def note(block: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (self.training if block.training else self.validation).append(arguments[0].shape[1])

        pl_module.model.visual.transformer.resblocks[0].register_forward_pre_hook(note)


def fit(module: L.LightningModule, **how: Any) -> Seen:
    seen = Seen()
    data = DataLoader(TensorDataset(*rows(STEPS * B)), batch_size=B)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[seen],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **({"max_epochs": 1} | how),
    )  # fmt: skip
    trainer.fit(module, data, DataLoader(TensorDataset(*rows(B)), batch_size=B))
    return seen


@pytest.mark.parametrize(
    ("share", "how", "masked", "whole"),
    [
        (0.3, {}, 7, 3),
        (0.0, {}, 10, 0),
        (1.0, {}, 0, 10),
        (0.05, {}, 10, 0),  # half a step, rounded to the even
        (0.4, {"accumulate_grad_batches": 2}, 6, 4),  # 3 of 5 steps of two batches
        (0.5, {"max_epochs": -1, "max_steps": 4}, 2, 2),
    ],
)
def test_the_last_steps_see_all(share, how, masked, whole):
    """By the count of optimizer steps of the whole run: 4 of 16 patches, then all; validation always sees all."""
    module = wrapper(mask_ratio=0.75, unmasked_share=share)
    seen = fit(module, **how)
    assert seen.training == masked * [1 + 4] + whole * [1 + 16]
    assert set(seen.validation) <= {1 + 16}
    assert module.model.visual.kept_patches == 0


@pytest.mark.parametrize("group", [0, 1])
def test_chunks_leave_out_the_same_in_the_recomputation(group):
    """Chunks of 3 that are recomputed, their blocks too, against the same chunks that are kept: 1e-12."""
    found = []
    for chunks, blocks in ((Chunks(3, seed=(1, 2)), group), (Chunks(3, kept=99, seed=(1, 2)), 0)):
        model = wrapper().model.double().train()
        model.visual.kept_patches = 7
        if blocks:
            recompute_blocks(model.visual, blocks)
        encode_in_chunks(model.encode_image, rows(8)[0], chunks, model.visual).sin().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.visual.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=1e-12, msg=name)


def test_a_teacher_sees_whole_images():
    """It is in eval mode: a copy of the tower that is masked looks at all patches."""
    module = wrapper(mask_ratio=0.5, distillation="softmax")
    seen: list[int] = []
    block = module.distillation.teacher.model.visual.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    fit(module)
    assert set(seen) == {1 + 16}


def test_what_cannot_leave_patches_out():
    with pytest.raises(UserError, match=r"mask_ratio is 0\.5; the image tower is ModifiedResNet"):
        wrapper(RESNET, mask_ratio=0.5)
    with pytest.raises(UserError, match=r"mask_ratio is 0\.5; the image tower is ImageTower"):
        CustomCLIPWrapper(image_tower(), bert(), image_size=8, mask_ratio=0.5)
    with pytest.raises(UserError, match=r"mask_ratio is 0\.98: no patch is left of the 16 patches"):
        wrapper(mask_ratio=0.98)
    with pytest.raises(UserError, match=r"mask_ratio is 0\.5 beside lock_image"):
        wrapper(mask_ratio=0.5, lock_image=True)
    for how in ({"mask_ratio": 1.0}, {"mask_ratio": -0.1}, {"unmasked_share": 1.1}):
        (name,) = how
        with pytest.raises(UserError, match=f"{name} is .*expected from 0"):
            wrapper(**how)
