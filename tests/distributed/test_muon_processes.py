"""Muon on two processes: the same bits on both; a matrix that is shared out moves as one process moves it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.gather import world
from train_clip.options import OptimizerOptions
from train_clip.training.muon import Muon

B, BATCHES = 8, 3  # of the global batch


def train() -> dict[str, Tensor]:
    """Three steps in micro-batches on as many processes as there are, blocks recomputed."""
    rank, processes = world()
    torch.manual_seed(0)
    module = CLIPWrapper(
        "tiny", TINY, 3, learning_rate=1e-2, warmup_steps=0, optimizer="muon", gradient_checkpointing=1
    )
    images = torch.randn(B * BATCHES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = [(image, f"picture {index}") for index, image in enumerate(images)]
    share = B // processes
    own = [pair for place, pair in enumerate(pairs) if place % B // share == rank]
    trainer = bare_trainer(max_epochs=1, use_distributed_sampler=False)
    trainer.fit(module, DataLoader(own, batch_size=share))
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_both_end_in_the_same_bits_and_near_one_process(tmp_path):
    """Three steps; of the MLPs' matrices to a tenth of the way, as a gradient's last bits are within bfloat16's."""
    first, second = run(train, tmp_path)
    alone = train()
    torch.manual_seed(0)
    start = dict(CLIPWrapper("tiny", TINY).named_parameters())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if "mlp.c_" in name and name.endswith("weight"):
            assert (value - alone[name]).norm() < 0.1 * (alone[name] - start[name]).norm(), name


def matrix() -> Tensor:
    return torch.randn(30, 10, generator=torch.Generator().manual_seed(0))


def two_steps(weight: nn.Parameter, *placed: Any) -> nn.Parameter:
    """Two steps of Muon, the gradients placed as the weight is."""
    rest = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    optimizer = Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.2}], rest, OptimizerOptions(momentum=0.95))
    for step in range(2):
        gradient = torch.randn(30, 10, generator=torch.Generator().manual_seed(1 + step))
        weight.grad = distribute_tensor(gradient, *placed) if placed else gradient
        optimizer.step()
    return weight


def sharded() -> dict[str, Tensor]:
    """A fused projection that lies on both processes by rows, by columns, and whole (FSDP2)."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for placement in (Shard(0), Shard(1), Replicate()):
        placed = (mesh, [placement])
        weight = two_steps(nn.Parameter(distribute_tensor(matrix(), *placed)), *placed)
        found[str(placement)] = weight.full_tensor().detach()
    return found


def test_a_sharded_matrix_moves_as_a_whole_one(tmp_path):
    """Bit for bit, on both."""
    expected = two_steps(nn.Parameter(matrix())).detach()
    for result in run(sharded, tmp_path):
        assert len(result) == 3
        for placement, found in result.items():
            assert torch.equal(found, expected), placement
