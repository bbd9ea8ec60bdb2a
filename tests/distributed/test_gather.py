"""Gathering and the sharded loss on two gloo processes against one process on the global batch, in float64.

B  pairs on a rank      W  ranks      N  pairs of the global batch (W · B)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_processes import run

from train_clip.gather import gather_all, gather_with_gradient, world
from train_clip.losses.contrastive import clip_loss
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.training.chunks import encode_in_chunks
from train_clip.training.module import share, unit_norm

W, B = 2, 4
LENGTHS = (3, 5)  # rows that each rank brings to gather_all


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Everything below, run once on both processes: starting them is what takes time."""
    return run(everything, tmp_path_factory.mktemp("gather"), W)


def everything() -> dict[str, Any]:
    return {
        "world": world(),
        "plain": step(minibatch=0),
        "chunks": step(minibatch=3),
        "gathered": gathered_gradient(),
        "beside": gradient_beside_the_gathered(),
        "unequal": [gather_all(rows) for rows in unequal(world()[0])],
    }


def build() -> CLIP:
    torch.manual_seed(0)
    image = {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2}
    text = {"context": 8, "vocab": 30, "layers": 2, "width": 12, "heads": 2}
    return CLIP(config_from_dict({"embed_dim": 8, "image": image, "text": text})).double()


def global_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 28, (W * B, 8), generator=generator)
    tokens[:, 5] = 29
    return torch.randint(256, (W * B, 3, 16, 16), generator=generator, dtype=torch.uint8), tokens


class Step(nn.Module):
    """What a training step does between the batch and the loss."""

    def __init__(self, minibatch: int) -> None:
        super().__init__()
        self.model = build()
        self.minibatch = minibatch

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        model, size = self.model, self.minibatch
        image_embeddings = encode_in_chunks(model.encode_image, images, size, (0,), model.visual)
        text_embeddings = encode_in_chunks(model.encode_text, tokens, size, (1,), model.transformer)
        return clip_loss(share(unit_norm(image_embeddings), unit_norm(text_embeddings)), model.logit_scale.exp())


def step(minibatch: int) -> dict[str, Any]:
    """This rank's loss on its share, and the gradients that DDP averaged."""
    rank, _ = world()
    images, tokens = (side[rank * B : (rank + 1) * B] for side in global_batch())
    replica = DistributedDataParallel(Step(minibatch))
    loss = replica(images, tokens)
    loss.backward()
    return {"loss": loss.item(), "gradients": {n: p.grad for n, p in replica.module.model.named_parameters()}}


def weights(rank: int) -> Tensor:
    return torch.randn(W * B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def gathered_gradient() -> dict[str, Tensor]:
    """Gradient of each rank's own weighted sum over everyone's rows; the rows are no contiguous tensor."""
    rank, _ = world()
    columns = (10 * rank + torch.arange(3 * B, dtype=torch.float64)).view(3, B).requires_grad_()
    everyone = gather_with_gradient(columns.T)
    (everyone * weights(rank)).sum().backward()
    return {"rows": everyone.detach(), "gradient": columns.grad.T}


def gradient_beside_the_gathered() -> Tensor:
    """Gradient of a tensor that is only added to the gathered one, and so receives the very same gradient."""
    rank, _ = world()
    own = torch.ones(W * B, 3, dtype=torch.float64, requires_grad=True)
    doubled = own * 2
    rows = torch.ones(B, 3, dtype=torch.float64, requires_grad=True)
    ((gather_with_gradient(rows) + doubled) * weights(rank)).sum().backward()
    return own.grad


def unequal(rank: int) -> list[Tensor]:
    """Rows of different kinds and lengths; the last only the second rank has."""
    length = LENGTHS[rank]
    floats = rank + torch.arange(2.0 * length).view(length, 2)
    integers = 2**62 + rank + torch.arange(length)
    deep = rank + torch.arange(6.0 * length, dtype=torch.float64).view(length, 3, 2)
    return [floats, integers, deep, torch.full((rank, 2), 7.0)]


def test_world(results):
    """Each process knows its rank and their number; a process that is alone is the first of one."""
    assert [result["world"] for result in results] == [(0, 2), (1, 2)]
    assert world() == (0, 1)


@pytest.mark.parametrize("how", ["plain", "chunks"])
def test_gradient_is_one_process(results, how):
    """DDP's averaged gradient of every parameter, temperature included, against one plain backward pass: 1e-12."""
    model = build()
    images, tokens = global_batch()
    similarity = model(images, tokens)[0]
    target = torch.arange(W * B)
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    loss.backward()
    assert sum(result[how]["loss"] for result in results) / W == pytest.approx(loss.item(), abs=1e-12)
    assert results[0][how]["loss"] != results[1][how]["loss"]
    assert model.logit_scale.grad.abs() > 1e-3
    for result in results:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                result[how]["gradients"][name], parameter.grad, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_gathered_rows_and_their_gradient(results):
    """Rows in the order of the ranks, equal on both; a row's gradient is the sum of what both ranks send it: 1e-12."""
    parts = [10 * rank + torch.arange(3 * B, dtype=torch.float64).view(3, B).T for rank in range(W)]
    sent = weights(0) + weights(1)
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"]["rows"], torch.cat(parts))
        own = sent[rank * B : (rank + 1) * B]
        torch.testing.assert_close(result["gathered"]["gradient"], own, rtol=0, atol=1e-12)


def test_gathering_leaves_other_gradients_alone(results):
    """What is added to the gathered rows gets its own rank's gradient only, against the weights by hand: 1e-12."""
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["beside"], 2 * weights(rank), rtol=0, atol=1e-12)


def test_gather_all(results):
    """Floats, large integers, more dimensions, and no rows at all on one rank: everyone's rows, bit for bit."""
    expected = [unequal(rank) for rank in range(W)]
    for result in results:
        for kind, parts in enumerate(result["unequal"]):
            assert len(parts) == W
            for rank, part in enumerate(parts):
                assert part.dtype == expected[rank][kind].dtype
                assert torch.equal(part, expected[rank][kind])


def test_alone():
    """One process gets its own rows back, with their graph."""
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(rows) is rows
    assert [part is rows for part in gather_all(rows)] == [True]
