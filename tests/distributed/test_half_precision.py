"""Weights and moments in bfloat16 on two processes: the same bits on both, and the gradient of one process."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader
from two_processes import bare_trainer, run

from tests.conftest import TINY
from train_clip import CLIPWrapper
from train_clip.gather import world
from train_clip.options import OptimizerOptions
from train_clip.training.half_precision import HalfAdamW

B, BATCHES = 8, 3  # of the global batch
PRECISIONS = ("32-true", "bf16-mixed")


class Watch(L.Callback):
    """Weights and moments after training, and the gradient of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.gradients = self.gradients or {n: p.grad.clone() for n, p in module.named_parameters()}

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        state = trainer.optimizers[0].state
        for name, parameter in module.named_parameters():
            moments = {key: value for key, value in state[parameter].items() if isinstance(value, Tensor)}
            self.end |= {f"{name} {key}": value.clone() for key, value in moments.items()}
            self.end[name] = parameter.detach().clone()


def train(precision: str = "32-true") -> dict[str, dict[str, Tensor]]:
    """Three steps on as many processes as there are, with another global random state on each."""
    rank, processes = world()
    torch.manual_seed(0)
    module = CLIPWrapper(
        "tiny", TINY, 3, learning_rate=1e-2, warmup_steps=0, half_weights="both", adam_statistics="bfloat16"
    )
    torch.manual_seed(rank)
    images = torch.randn(B * BATCHES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = [(image, f"picture {index}") for index, image in enumerate(images)]
    share = B // processes
    own = [pair for place, pair in enumerate(pairs) if place % B // share == rank]
    watch = Watch()
    trainer = bare_trainer(callbacks=[watch], max_epochs=1, use_distributed_sampler=False, precision=precision)
    trainer.fit(module, DataLoader(own, batch_size=share))
    return {"gradients": watch.gradients, "end": watch.end}


def both() -> dict[str, dict[str, dict[str, Tensor]]]:
    return {precision: train(precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    return run(both, tmp_path_factory.mktemp("half"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_end_in_the_same_bits(results, precision):
    """After three steps: every weight and every moment, of bfloat16 among them."""
    first, second = (result[precision]["end"] for result in results)
    assert {first["model.token_embedding.weight"].dtype, first["model.visual.proj exp_avg_sq"].dtype} == {
        torch.bfloat16
    }
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_gradient_is_one_processes(results):
    """Of the first step: each process rounds its share once, and so does their sum; of float32 to its own rounding."""
    expected = train()["gradients"]
    for name, gradient in results[0]["32-true"]["gradients"].items():
        rounding = 2**-7 if gradient.dtype == torch.bfloat16 else 1e-4
        scale = expected[name].float().abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=rounding, atol=rounding * scale / 4)


def sharded() -> dict[str, Any]:
    """Two steps of a layer whose matrix lies on both processes by halves (FSDP2), in float32 and in bfloat16."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(distribute_tensor(torch.full((6, 4000), 1.0, dtype=dtype), mesh, [Shard(0)]))
        optimizer = half_adamw(weight, half_moments=dtype == torch.bfloat16)
        for step in range(2):
            gradient = torch.full((6, 4000), 0.3 + step, dtype=dtype)
            weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
        assert optimizer.state[weight]["exp_avg"].to_local().shape == (3, 4000)
        found[str(dtype)] = weight.full_tensor().detach()
    return found


def half_adamw(weight: nn.Parameter, half_moments: bool) -> HalfAdamW:
    groups = [{"params": [weight], "weight_decay": 0.2}]
    state = "bfloat16" if half_moments else "float32"
    return HalfAdamW(groups, OptimizerOptions(learning_rate=1e-3, betas=(0.9, 0.98), eps=1e-6, adam_statistics=state))


def test_parts_of_a_sharded_weight_are_rounded_apart(tmp_path):
    """In float32 as on one process; in bfloat16 each half by noise of its own, and as one process does on average."""
    found, other = run(sharded, tmp_path)
    expected = nn.Parameter(torch.full((6, 4000), 1.0))
    optimizer = half_adamw(expected, half_moments=False)
    for step in range(2):
        expected.grad = torch.full((6, 4000), 0.3 + step)
        optimizer.step()
    torch.testing.assert_close(found["torch.float32"], expected.detach())
    halves = found["torch.bfloat16"]
    assert torch.equal(halves, other["torch.bfloat16"])
    assert not torch.equal(halves[:3], halves[3:])
    assert halves.double().mean().item() == pytest.approx(expected.mean().item(), abs=5 * 2**-8 / 24_000**0.5)
