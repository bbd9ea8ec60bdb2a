"""Augmented batches on two processes against one: the same images, and so the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.gather import world

B, BATCHES = 8, 3  # of the global batch
HOW = {"color_jitter": 1.0, "grayscale": 0.2, "horizontal_flip": 0.5, "vertical_flip": 0.5}


def train() -> tuple[Tensor, dict[str, Tensor]]:
    """Three steps on as many processes as there are: the images that this one encoded, and the weights at the end."""
    rank, processes = world()
    torch.manual_seed(0)
    module = CLIPWrapper("tiny", TINY, learning_rate=1e-2, warmup_steps=0, eps=0.5, **HOW)
    seen: list[Tensor] = []
    encode = module.model.encode_image
    module.model.encode_image = lambda images: (seen.append(images), encode(images))[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (B * BATCHES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    share = B // processes
    own = [(image, f"picture {n}") for n, image in enumerate(images) if n % B // share == rank]
    trainer = bare_trainer(max_epochs=1, use_distributed_sampler=False, precision="64-true")
    trainer.fit(module, DataLoader(own, batch_size=share))
    return torch.stack(seen), module.state_dict()


def test_two_processes_augment_as_one(tmp_path) -> None:
    """Each encodes its half of every global batch that one process encodes, to the byte; weights to 1e-10."""
    halves = run(train, tmp_path)
    images, weights = train()
    assert torch.equal(torch.cat([seen for seen, _ in halves], dim=1), images)
    for _, found in halves:
        for name, expected in weights.items():
            assert found[name].numpy() == pytest.approx(expected.numpy(), abs=1e-10), name
